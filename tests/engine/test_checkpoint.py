"""What a checkpoint folder says, and that no damaged one is loaded."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_m3 import build

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.checkpoint import read_checkpoint
from langchain_bge_dense._engine.files import digest_of, shapes
from langchain_bge_dense.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WEIGHTS, LISTED = "model.safetensors", "model.safetensors.index.json"
LAYER = "encoder.layer.0.intermediate.dense.weight"
TEXT = "a dense vector"


@pytest.fixture(scope="module", autouse=True)
def _fast_collection(tiny: BGEM3Embeddings) -> Iterator[None]:
    # FlagEmbedding collects garbage with each model that goes; most of what is there stays.
    tiny.load()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def load(folder: Path, **settings: Any) -> BGEM3Embeddings:
    fixed = {"device": "cpu", "dtype": "float32"}
    return BGEM3Embeddings(model=folder, **fixed, **settings).load()


def digest(folder: Path) -> str:
    return read_checkpoint(folder, "m3").digest


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float = 0.5) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return change


def setting(name: str, **values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")

    return change


def taken_from_another(name: str, **sizes: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        other = build(folder.parent / "other", **sizes)
        shutil.copy(other / name, folder / name)

    return change


def tensors(change: Callable[[str], str]) -> Callable[[Path], object]:
    def rename(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        save_file(
            {change(name): t for name, t in found.items()}, folder / WEIGHTS, {"format": "pt"}
        )

    return rename


def head(name: str, **changed: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: torch.save(torch.load(folder / name) | changed, folder / name)


def without_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("nothing for this kind of model")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa\nsize 2271064456\n"
DAMAGES = {
    "weights cut short": (cut(WEIGHTS), WEIGHTS, "damaged"),
    "weights cut by a byte": (cut(WEIGHTS, 0.99999), WEIGHTS, "damaged"),
    "weights empty": (write(WEIGHTS, b""), WEIGHTS, "damaged"),
    "weights a web page": (write(WEIGHTS, b"<!doctype html>" * 99), WEIGHTS, "damaged"),
    "weights a pointer": (write(WEIGHTS, POINTER), WEIGHTS, "git lfs pull"),
    "weights renamed": (
        lambda folder: renamed(folder, lambda name: name.replace("query", "q")),
        WEIGHTS,
        "query",
    ),
    "weights of fewer layers": (taken_from_another(WEIGHTS, layers=1), WEIGHTS, "layer.1"),
    "weights of more layers": (taken_from_another(WEIGHTS, layers=3), WEIGHTS, "layer.2"),
    "weights of another width": (
        taken_from_another(WEIGHTS, intermediate=48),
        WEIGHTS,
        "intermediate",
    ),
    "weights of fewer tokens": (taken_from_another(WEIGHTS, vocab=100), WEIGHTS, "(100, 32)"),
    "config of fewer layers": (setting("config.json", num_hidden_layers=1), WEIGHTS, "layer.1"),
    "config of no layers": (setting("config.json", num_hidden_layers=-1), WEIGHTS, "layer.0"),
    "config of more tokens": (setting("config.json", vocab_size=10**9), WEIGHTS, "1000000000"),
    "config cut short": (cut("config.json"), "config.json", "JSON"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json", "damaged"),
    "config a list": (write("config.json", b"[]"), "config.json", "not a JSON object"),
    "config without a width": (setting("config.json", hidden_size=None), "config.json", "None"),
    "config in words": (setting("config.json", hidden_size="32"), "config.json", "'32'"),
    "config with odd padding": (
        setting("config.json", pad_token_id="x"),  # noqa: S106
        "config.json",
        "'x'",
    ),
    "config that does not divide": (
        setting("config.json", num_attention_heads=5),
        "config.json",
        "multiple",
    ),
    "config of no known kind": (setting("config.json", model_type="odd"), "config.json", "odd"),
    "config of an odd function": (setting("config.json", hidden_act="odd"), "config.json", "odd"),
    "config of an odd dtype": (
        setting("config.json", dtype="os.system"),
        "config.json",
        "os.system",
    ),
    "head cut short": (cut("colbert_linear.pt"), "colbert_linear.pt", "damaged"),
    "head empty": (write("sparse_linear.pt", b""), "sparse_linear.pt", "damaged"),
    "head of another width": (
        taken_from_another("colbert_linear.pt", hidden=16),
        "colbert_linear.pt",
        "(16, 16)",
    ),
    "head with a bias of another width": (
        head("sparse_linear.pt", bias=torch.zeros(32)),
        "sparse_linear.pt",
        "(32,)",
    ),
    "head with a scalar for a bias": (
        head("sparse_linear.pt", bias=torch.tensor(0.5)),
        "sparse_linear.pt",
        "'bias': ()",
    ),
    "head of scalars": (
        head("colbert_linear.pt", bias=torch.tensor(0.5), weight=torch.tensor(0.5)),
        "colbert_linear.pt",
        "'bias': ()",
    ),
    "head without a bias": (
        lambda folder: torch.save({"weight": torch.zeros(32, 32)}, folder / "colbert_linear.pt"),
        "colbert_linear.pt",
        "instead of",
    ),
    "heads swapped": (
        lambda folder: shutil.copy(folder / "colbert_linear.pt", folder / "sparse_linear.pt"),
        "sparse_linear.pt",
        "(1, 32)",
    ),
    "head a list": (
        lambda folder: torch.save([torch.zeros(1)], folder / "sparse_linear.pt"),
        "sparse_linear.pt",
        "damaged",
    ),
    "tokenizer cut short": (cut("tokenizer.json"), "tokenizer.json", "damaged"),
    "tokenizer of no kind": (write("tokenizer.json", b"{}"), "tokenizer.json", "damaged"),
    "tokenizer with an odd model": (
        setting("tokenizer.json", model={"type": "Odd"}),
        "tokenizer.json",
        "damaged",
    ),
    "tokenizer settings cut short": (cut("tokenizer_config.json"), "tokenizer_config.json", "JSON"),
    "token names cut short": (
        cut("special_tokens_map.json"),
        "special_tokens_map.json",
        "JSON",
    ),
    "tokenizer of another kind": (without_tokens, "checkpoint", "Copy it from"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_repaired_one_loads(
    damage: str, folder: Path, tiny_checkpoint: Path, tiny: BGEM3Embeddings
) -> None:
    change, name, said = DAMAGES[damage]
    change(folder)
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        embeddings.load()
    assert type(caught.value) in {ValueError, BrokenCheckpointError}  # and not a parser's own
    assert str(folder) in str(caught.value)
    assert said in str(caught.value)
    shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
    for repaired in (embeddings, load(folder)):
        assert repaired.embed_query(TEXT) == tiny.embed_query(TEXT)


@pytest.mark.parametrize("name", [WEIGHTS, "sparse_linear.pt"])
def test_a_file_cut_short_has_no_fingerprint(folder: Path, name: str) -> None:
    cut(name)(folder)
    with pytest.raises(ValueError, match=re.escape(name)):
        _ = BGEM3Embeddings(model=folder).fingerprint


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"token ids up to 596, and the model has embeddings for 9"
    ):
        load(build(tmp_path, vocab=9))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "sparse_linear.pt"])
def test_a_folder_in_place_of_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(OSError, match=re.escape(str(folder / name))):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "sparse_linear.pt", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(tiny_checkpoint: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = shutil.copytree(tiny_checkpoint, Path(open_to_all) / "checkpoint")
        for file in (Path(open_to_all), *folder.iterdir()):
            file.chmod(0o755)
        with as_nobody():
            read_checkpoint(folder, "readable")
        (folder / name).chmod(0)
        with as_nobody(), pytest.raises(PermissionError, match=re.escape(str(folder / name))):
            read_checkpoint(folder, "unreadable")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def in_shards(folder: Path, suffix: str) -> list[Path]:
    """Split the weights of a folder in two."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    places = {tensor: names[index % 2] for index, tensor in enumerate(sorted(found))}
    for name in names:
        part = {tensor: found[tensor] for tensor, place in places.items() if place == name}
        if suffix == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
class TestShards:
    def test_give_the_same_vectors(self, folder: Path, suffix: str, tiny: BGEM3Embeddings) -> None:
        in_shards(folder, suffix)
        assert load(folder).embed_query(TEXT) == tiny.embed_query(TEXT)

    def test_are_all_needed(self, folder: Path, suffix: str) -> None:
        _, second = in_shards(folder, suffix)
        second.unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {re.escape(second.name)}, which"):
            load(folder)

    def test_are_all_checked(self, folder: Path, suffix: str) -> None:
        _, second = in_shards(folder, suffix)
        os.truncate(second, second.stat().st_size - 10)
        with pytest.raises(ValueError, match=re.escape(str(second))):
            load(folder)

    def test_are_all_in_the_digest(self, folder: Path, suffix: str) -> None:
        first, second = in_shards(folder, suffix)
        before = digest(folder)
        second.write_bytes(first.read_bytes())
        assert digest(folder) != before

    @pytest.mark.parametrize("listed", [{}, [], "x", {"a": "../../elsewhere.bin"}, {"a": "b\\c"}])
    def test_are_listed_sensibly(self, folder: Path, suffix: str, listed: Any) -> None:
        in_shards(folder, suffix)
        [index] = folder.glob("*.index.json")
        index.write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(ValueError, match=re.escape(str(index))):
            load(folder)


def test_pickled_weights_give_the_same_vectors(folder: Path, tiny: BGEM3Embeddings) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert load(folder).embed_query(TEXT) == tiny.embed_query(TEXT)


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    found = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    found |= {"lm_head.dense.weight": torch.zeros(3), "embeddings.position_ids": torch.zeros(2)}
    save_file(found, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"roberta.{name}",
        lambda name: re.sub(r"(LayerNorm\.)weight", r"\1gamma", name),
        lambda name: re.sub(r"(LayerNorm\.)bias", r"\1beta", name),
    ],
)
def test_weights_under_names_that_transformers_knows_load(
    folder: Path, change: Callable[[str], str], tiny: BGEM3Embeddings
) -> None:
    renamed(folder, change)
    assert load(folder).embed_query(TEXT) == tiny.embed_query(TEXT)


@pytest.mark.parametrize("prefix", ["module.", "model.", "bert.", "encoder."])
def test_weights_that_transformers_would_pass_over_are_refused(folder: Path, prefix: str) -> None:
    renamed(folder, lambda name: prefix + name)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} belong to another model.*37 tensors"):
        load(folder)


@pytest.mark.parametrize("source", [WEIGHTS, "sparse_linear.pt"])
def test_changed_bytes_give_no_other_error_than_valueerror(
    tiny_checkpoint: Path, tmp_path: Path, source: str
) -> None:
    chance = random.Random(0)
    original = (tiny_checkpoint / source).read_bytes()
    refused = 0
    for _ in range(200):
        changed = bytearray(original)
        for _ in range(chance.randrange(1, 5)):
            changed[chance.randrange(min(len(changed), 4000))] = chance.randrange(256)
        (tmp_path / source).write_bytes(changed)
        try:
            shapes(tmp_path / source)
        except ValueError:
            refused += 1
    assert refused > 50


class TestDigest:
    def test_is_the_same_for_a_copy(self, folder: Path, tiny_checkpoint: Path) -> None:
        (folder / "README.md").write_text("a copy")
        shutil.copytree(folder, folder.parent / "another name")
        digests = {digest(f) for f in (folder, tiny_checkpoint, folder.parent / "another name")}
        assert len(digests) == 1

    @pytest.mark.parametrize(
        "change",
        [
            setting("config.json", layer_norm_eps=1e-12),
            setting("tokenizer.json", normalizer=None),
            setting("tokenizer_config.json", model_max_length=7),
            lambda folder: (folder / "sparse_linear.pt").unlink(),
            taken_from_another("colbert_linear.pt", seed=1),
            taken_from_another(WEIGHTS, seed=1),
        ],
        ids=["config", "tokenizer", "tokenizer settings", "no head", "head", "weights"],
    )
    def test_is_another_for_another_model(
        self, folder: Path, change: Callable[[Path], object]
    ) -> None:
        before = digest(folder)
        change(folder)
        assert digest(folder) != before

    def test_sees_a_single_tensor(self, folder: Path) -> None:
        before, found = digest(folder), load_file(folder / WEIGHTS)
        found[LAYER][0, 0] += 1e-3
        save_file(found, folder / WEIGHTS, {"format": "pt"})
        assert digest(folder) != before

    def test_sees_a_matrix_in_gigabytes_and_reads_a_few_megabytes(self, tmp_path: Path) -> None:
        matrix, size = 4 << 20, 2_271_064_456  # of BGE-M3 in float32
        with (tmp_path / WEIGHTS).open("wb") as stream:
            stream.truncate(size)
        digests = [digest_of(tmp_path, [tmp_path / WEIGHTS], "")]
        for start in (0, 1_234_567_890, size - matrix):
            with (tmp_path / WEIGHTS).open("r+b") as stream:
                stream.seek(start)
                stream.write(b"x" * matrix)
            read = bytes_read()
            digests.append(digest_of(tmp_path, [tmp_path / WEIGHTS], ""))
            assert bytes_read() - read < 6 << 20
        assert len(set(digests)) == len(digests)


def bytes_read() -> int:
    """Bytes that this process has read so far, or 0 where the system does not say."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return 0
    return int(re.findall(r"rchar: (\d+)", counters.read_text())[0])


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        (None, "cls"),
        ({}, "mean"),  # sentence-transformers' own default
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"include_prompt": True, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling(folder: Path, content: dict[str, Any] | None, pooling: str) -> None:
    if content is None:
        shutil.rmtree(folder / "1_Pooling")
        (folder / "modules.json").unlink()
    else:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert read_checkpoint(folder, "m3").modules.pooling == pooling


@pytest.mark.parametrize(
    "content",
    [
        {"pooling_mode_lasttoken": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
    ],
)
def test_pooling_that_does_not_exist_here(
    folder: Path, content: dict[str, Any], tiny: BGEM3Embeddings
) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1_Pooling.*only cls and mean"):
        load(folder)
    assert load(folder, pooling="cls").embed_query(TEXT) == tiny.embed_query(TEXT)


@pytest.mark.parametrize(
    ("family", "padding", "positions"),
    [
        ("xlm-roberta", 1, 512),
        ("roberta", 0, 513),
        ("camembert", 1, 512),
        ("mpnet", 1, 512),
        ("bert", 0, 514),
        ("modernbert", 50283, 514),
    ],
)
def test_positions(folder: Path, family: str, padding: int, positions: int) -> None:
    setting("config.json", model_type=family, pad_token_id=padding)(folder)
    assert read_checkpoint(folder, "m3").positions == positions


@pytest.mark.parametrize(
    "missing", [["sparse_linear.pt"], ["colbert_linear.pt", "sparse_linear.pt"]]
)
def test_heads(folder: Path, missing: list[str]) -> None:
    assert read_checkpoint(folder, "m3").has_heads
    for name in missing:
        (folder / name).unlink()
    assert not read_checkpoint(folder, "m3").has_heads
    assert load(folder).embed_query(TEXT)
