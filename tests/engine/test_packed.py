"""What a first load leaves in the cache, and what a later load makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine import packed
from langchain_bge_dense.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_bge_dense import M3Encoding

TEXTS = ["All human beings are born free", "什么是稠密向量?", "", "<pad> a  b <mask>"]
DTYPES = ["float32", "bfloat16", "float16", "int8"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, in its own place."""
    monkeypatch.setenv(packed.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def encode(folder: Path, dtype: str = "float32") -> M3Encoding:
    """Outputs of a model that is loaded for this call."""
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype=dtype)
    try:
        return embeddings.encode(TEXTS, lexical=True, colbert=True)
    finally:
        embeddings.close()


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.packed.safetensors"))


def assert_equal(found: M3Encoding, expected: M3Encoding) -> None:
    assert np.array_equal(found.dense, expected.dense)
    assert found.lexical == expected.lexical
    assert all(map(np.array_equal, found.colbert, expected.colbert))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loads that ran all checks."""
    from langchain_bge_dense._engine import loading

    loads, check = [], loading.check_weights
    monkeypatch.setattr(
        loading,
        "check_weights",
        lambda checkpoint: (loads.append(checkpoint.name), check(checkpoint)),
    )
    return loads


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_later_load_gives_the_same(
    folder: Path, cache: Path, checked: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(packed.VARIABLE, "0")
    without = encode(folder, dtype)
    assert not cache.exists()
    monkeypatch.setenv(packed.VARIABLE, str(cache))
    first, again = encode(folder, dtype), encode(folder, dtype)
    assert_equal(first, without)
    assert_equal(again, without)
    assert len(checked) == 2
    assert len(kept(cache)) == 1


LOAD = """
import json, sys
from langchain_bge_dense import BGEM3Embeddings
vector = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype=sys.argv[2]).embed_query("free")
print(json.dumps([vector, [name for name in sys.modules if name.startswith(sys.argv[3])]]))
"""


def load_elsewhere(folder: Path, dtype: str, modules: str, code: str = LOAD) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(folder), dtype, modules]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def printed(process: subprocess.Popen) -> list:
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_later_load_imports_no_modelling_code(folder: Path, cache: Path, dtype: str) -> None:
    first, imported = printed(load_elsewhere(folder, dtype, "transformers"))
    assert "transformers" in imported
    again, imported = printed(load_elsewhere(folder, dtype, "transformers"))
    assert again == first
    assert not imported


def test_processes_that_load_at_once(folder: Path, cache: Path) -> None:
    loads = [load_elsewhere(folder, "bfloat16", "none") for _ in range(3)]
    first, *others = [printed(load) for load in loads]
    assert others == [first, first]
    assert len(kept(cache)) == 1
    assert not list(cache.glob("*.part"))


def test_the_files_are_the_users_own(folder: Path, cache: Path) -> None:
    encode(folder, "int8")
    assert cache.stat().st_mode & 0o777 == 0o700
    [file] = kept(cache)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_may_write_is_not_read(
    folder: Path, cache: Path, checked: list[str]
) -> None:
    encode(folder)
    [file] = kept(cache)
    file.chmod(0o666)
    encode(folder)
    assert len(checked) == 2


def write_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["encoder.layer.0.output.dense.weight"][3, 3] += 1
    save_file(tensors, file, {"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"][9:12] = content["model"]["vocab"][11:8:-1]
    file.write_text(json.dumps(content))


def write_head(folder: Path) -> None:
    file = folder / "sparse_linear.pt"
    torch.save({name: weight * 2 for name, weight in torch.load(file).items()}, file)


def write_pooling(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')


def write_modules(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    (folder / "2_Dense").mkdir()
    config = {
        "in_features": 32,
        "out_features": 32,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    weights = {"linear.weight": torch.eye(32), "linear.bias": torch.ones(32)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def write_lower_case(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')


CHANGES = [
    write_weights,
    write_tokenizer,
    write_head,
    write_pooling,
    write_modules,
    write_lower_case,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_has_changed_is_loaded_as_it_is(
    folder: Path, cache: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = encode(folder)
    change(folder)
    found = encode(folder)
    monkeypatch.setenv(packed.VARIABLE, "0")
    assert_equal(found, encode(folder))
    with pytest.raises(AssertionError):
        assert_equal(found, before)


def test_what_makes_the_file_is_in_its_name(
    folder: Path, cache: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(folder, "int8")
    monkeypatch.setattr(packed, "installed_version", lambda name: f"a later {name}")
    encode(folder, "int8")
    encode(folder, "bfloat16")
    assert len(checked) == len(kept(cache)) == 3


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def overwrite(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "dtype"),
    [(empty, "int8"), (truncate, "float32"), (flip_a_bit, "int8"), (overwrite, "float32")],
)
def test_a_damaged_file_is_written_anew(
    folder: Path, cache: Path, checked: list[str], dtype: str, damage: Callable[[Path], None]
) -> None:
    first = encode(folder, dtype)
    [file] = kept(cache)
    content = file.read_bytes()
    damage(file)
    assert_equal(encode(folder, dtype), first)
    assert file.read_bytes() == content
    assert_equal(encode(folder, dtype), first)
    assert len(checked) == 2


def test_a_checkpoint_that_is_refused_is_not_served(
    folder: Path, cache: Path, checked: list[str]
) -> None:
    encode(folder)
    shutil.copy(folder / "colbert_linear.pt", folder / "sparse_linear.pt")
    with pytest.raises(BrokenCheckpointError, match=r"sparse_linear\.pt"):
        encode(folder)
    assert len(kept(cache)) == 1
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        encode(folder)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_file_in_place_of_the_folder(
    tmp_path: Path, cache: Path, folder: Path, dtype: str
) -> None:
    cache.write_text("in the way")
    encode(folder, dtype)
    assert cache.read_text() == "in the way"


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)\n"


def test_a_disk_that_is_full_halfway(folder: Path, cache: Path) -> None:
    first = printed(load_elsewhere(folder, "bfloat16", "none", LIMITED + LOAD))
    assert not kept(cache)
    assert not list(cache.glob("*.part"))
    assert printed(load_elsewhere(folder, "bfloat16", "none")) == first


def test_a_disk_without_room_for_it(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: full)
    encode(folder, "int8")
    assert not kept(cache)


READ_ONLY = """
import subprocess, sys
subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "ro", "tmpfs", sys.argv[3]], check=True)
sys.argv[3] = "none"
"""


def test_a_disk_that_is_read_only(folder: Path, cache: Path) -> None:
    cache.mkdir()
    code = READ_ONLY + LOAD
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", code]
    tried = subprocess.run([*command[:3], "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("this system lets nobody mount")
    ended = subprocess.run(
        [*command, str(folder), "bfloat16", str(cache)], stdout=subprocess.PIPE, check=True
    )
    assert ended.stdout
    assert not list(cache.iterdir())


SLOW = """
import time
from langchain_bge_dense._engine import packed
digest = packed._content_digest
packed._content_digest = lambda path: print("written", flush=True) or time.sleep(60)
"""


def test_killed_before_its_file_is_whole(folder: Path, cache: Path, checked: list[str]) -> None:
    writer = load_elsewhere(folder, "int8", "none", SLOW + LOAD)
    assert any("written" in line for line in writer.stdout)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert list(cache.glob("*.part"))
    assert not kept(cache)
    first = encode(folder, "int8")
    assert not list(cache.glob("*.part"))
    assert_equal(encode(folder, "int8"), first)
    assert len(checked) == 1


def test_the_last_used_files_stay(
    tiny_checkpoint: Path, cache: Path, checked: list[str], tmp_path: Path
) -> None:
    names = [f"model{number}" for number in range(4)]
    cache.mkdir()
    others = cache / "model.safetensors"  # whose folder was named for the cache
    others.write_bytes(b"weights")
    os.utime(others, (0, 0))
    for name in names:
        encode(shutil.copytree(tiny_checkpoint, tmp_path / name))
        encode(tmp_path / names[0])
        time.sleep(0.01)  # of the file system's clock
    assert {file.name.partition("-")[0] for file in kept(cache)} == {"model0", "model2", "model3"}
    assert checked == names
    assert others.exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_word_embeddings_stay_mapped(folder: Path, cache: Path, dtype: str) -> None:
    encode(folder, dtype)
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype=dtype)
    vector = embeddings.load().embed_query("free")
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(cache) in line for line in lines) == (dtype != "float32")
    assert not [line for line in lines if str(folder) in line]
    shutil.rmtree(cache)  # a mapped file stays until nobody has it
    assert embeddings.embed_query("free") == vector


FORK = """
import json, os, sys
from langchain_bge_dense import BGEM3Embeddings
embeddings = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype=sys.argv[2]).load()
child = os.fork()
print(json.dumps(embeddings.embed_query("free")), flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forked_child_embeds(folder: Path, cache: Path, dtype: str) -> None:
    encode(folder, dtype)
    forked = load_elsewhere(folder, dtype, "none", FORK)
    output, _ = forked.communicate()
    assert forked.returncode == 0
    parent, child = output.splitlines()
    assert parent == child


def old_names(folder: Path) -> None:
    """BERT's first names of a norm."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def prefixed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    named = {f"roberta.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def without_pooler(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    own = {name: t.clone() for name, t in tensors.items() if not name.startswith("pooler.")}
    assert len(own) < len(tensors)
    save_file(own, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path, *, old: bool = False) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (folder / "model.safetensors").unlink()


def pickled_long_ago(folder: Path) -> None:
    pickled(folder, old=True)


def sharded(folder: Path) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: t for name, t in tensors.items() if places[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def half(folder: Path) -> None:
    """Stored in another dtype than it is loaded in."""
    tensors = load_file(folder / "model.safetensors")
    narrow = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(narrow, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("store", "in_place"),
    [
        *((store, True) for store in (prefixed, without_pooler, pickled, sharded)),
        *((store, False) for store in (pickled_long_ago, old_names, half)),
    ],
)
def test_checkpoints_as_they_are_stored(
    request: pytest.FixtureRequest, store: Callable[[Path], None], dtype: str, *, in_place: bool
) -> None:
    """Without a place for each weight, float32 keeps nothing."""
    folder, cache, checked, monkeypatch = map(
        request.getfixturevalue, ("folder", "cache", "checked", "monkeypatch")
    )
    store(folder)
    monkeypatch.setenv(packed.VARIABLE, "0")
    expected = encode(folder, dtype)
    monkeypatch.setenv(packed.VARIABLE, str(cache))
    for _ in range(2):
        assert_equal(encode(folder, dtype), expected)
    assert len(kept(cache)) == (in_place or dtype != "float32")
    assert len(checked) == 3 - len(kept(cache))
