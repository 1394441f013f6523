"""A checkpoint from someone who means harm: nothing of it runs, and nothing beside it is read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.hub import HubSource, resolve
from langchain_bge_dense.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = "pytorch_model.bin"
TEXT = "a dense vector"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


def as_zip(file: Path, content: Any) -> None:
    torch.save(content, file)


def as_old_format(file: Path, content: Any) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_pickle(file: Path, content: Any) -> None:
    file.write_bytes(pickle.dumps(content))


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with pickled weights."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    torch.save(load_file(folder / "model.safetensors"), folder / WEIGHTS)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Is there only if somebody's code has run."""
    return tmp_path / "marker"


def load(folder: Path | str, **settings: Any) -> BGEM3Embeddings:
    fixed = {"device": "cpu", "dtype": "float32"}
    return BGEM3Embeddings(model=folder, **fixed, **settings).load()


def test_the_payload_works(tmp_path: Path, marker: Path) -> None:
    as_zip(tmp_path / WEIGHTS, [Payload(marker)])
    torch.load(tmp_path / WEIGHTS, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("write", [as_zip, as_old_format, as_pickle])
@pytest.mark.parametrize("name", [WEIGHTS, "colbert_linear.pt", "sparse_linear.pt"])
def test_pickled_code_does_not_run(
    folder: Path, marker: Path, name: str, write: Callable[[Path, Any], None]
) -> None:
    original = torch.load(folder / name)
    write(folder / name, original | {"payload": Payload(marker)})
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as caught:
        load(folder)
    assert type(caught.value) is BrokenCheckpointError
    assert "weights_only" not in str(caught.value)  # torch says how to run it
    assert not marker.exists()


def test_pickled_code_in_a_shard_does_not_run(folder: Path, marker: Path) -> None:
    found = torch.load(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shard = folder / "pytorch_model-00001-of-00001.bin"
    as_zip(shard, found | {"payload": Payload(marker)})
    index = {"weight_map": dict.fromkeys(found, shard.name)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(str(shard))):
        load(folder)
    assert not marker.exists()


def test_a_compiled_program_does_not_run(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=re.escape(str(folder / WEIGHTS))):
        load(folder)


def with_code(folder: Path, marker: Path, name: str, **settings: Any) -> None:
    """Put a module into the folder, and let a file ask for it."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nModel = Other = None\n")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | settings))


CODE_OF_MODELS = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}
CODE_OF_TOKENIZERS = {"AutoTokenizer": ["evil.Model", "evil.Other"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.json", {"auto_map": CODE_OF_MODELS}),
        ("tokenizer_config.json", {"auto_map": CODE_OF_TOKENIZERS}),
        ("tokenizer_config.json", {"auto_map": CODE_OF_TOKENIZERS["AutoTokenizer"]}),
    ],
    ids=["model", "tokenizer", "tokenizer in the old form"],
)
def test_code_does_not_run_and_no_namesake_runs_in_its_place(
    folder: Path, marker: Path, name: str, settings: dict[str, Any]
) -> None:
    """Such a Qwen2 looks both ways, and transformers' own Qwen2 does not."""
    with_code(folder, marker, name, **settings)
    with pytest.raises(ValueError, match=rf"{name} refers to custom code \(.*evil\.Model"):
        load(folder)
    assert not marker.exists()


def test_code_for_other_tasks_is_passed_over(
    folder: Path, marker: Path, tiny: BGEM3Embeddings
) -> None:
    code = {"AutoModelForSequenceClassification": "evil.Model"}
    with_code(folder, marker, "config.json", auto_map=code)
    assert load(folder).embed_query(TEXT) == tiny.embed_query(TEXT)
    assert not marker.exists()


@pytest.mark.parametrize("settings", [{}, {"auto_map": CODE_OF_TOKENIZERS}])
def test_code_for_a_tokenizer_of_no_known_kind_does_not_run(
    folder: Path, marker: Path, settings: dict[str, Any]
) -> None:
    with_code(folder, marker, "tokenizer_config.json", tokenizer_class="os.system", **settings)
    # transformers 5 passes over such a class; before, it is an error.
    with contextlib.suppress(ValueError):
        load(folder)
    assert not marker.exists()


def test_a_model_that_needs_its_own_code_is_refused(folder: Path, marker: Path) -> None:
    with_code(folder, marker, "config.json", auto_map=CODE_OF_MODELS, model_type="evil")
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "detour",
    [
        {"transformers_weights": "other.safetensors"},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
    ids=lambda detour: next(iter(detour)),
)
def test_a_config_that_leads_elsewhere_is_refused(
    folder: Path, marker: Path, detour: dict[str, Any]
) -> None:
    with_code(folder, marker, "config.json", **detour)
    [key] = detour
    with pytest.raises(ValueError, match=rf"config\.json sets {key}="):
        load(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    adapter = {"base_model_name_or_path": "someone/model", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(folder)


class TestLinks:
    """The hub's library makes links from a snapshot to `blobs`. Nobody else has any to make."""

    @pytest.fixture
    def cache(self, folder: Path, tmp_path: Path) -> Path:
        """A cache as the hub's library leaves it."""
        home = tmp_path / "cache" / "models--org--m3"
        snapshot = home / "snapshots" / ("0" * 40)
        for made in (snapshot / "1_Pooling", home / "blobs", home / "refs"):
            made.mkdir(parents=True)
        (home / "refs" / "main").write_text(snapshot.name)
        for number, file in enumerate(f for f in folder.rglob("*") if f.is_file()):
            shutil.copy(file, home / "blobs" / str(number))
            link = snapshot / file.relative_to(folder)
            link.symlink_to(os.path.relpath(home / "blobs" / str(number), link.parent))
        return tmp_path / "cache"

    @staticmethod
    def snapshot(cache: Path) -> Path:
        return cache / "models--org--m3" / "snapshots" / ("0" * 40)

    @staticmethod
    def find(cache: Path) -> Path:
        return resolve(HubSource("org/m3", cache_folder=str(cache), local_files_only=True))

    def test_of_the_hub_are_followed(self, cache: Path, tiny: BGEM3Embeddings) -> None:
        assert self.find(cache) == self.snapshot(cache)
        embeddings = load("org/m3", cache_folder=str(cache), local_files_only=True)
        assert embeddings.embed_query(TEXT) == tiny.embed_query(TEXT)

    def test_of_the_user_around_the_cache_are_followed(self, cache: Path, tmp_path: Path) -> None:
        moved = (cache / "models--org--m3").rename(tmp_path / "on another disk")
        (cache / "models--org--m3").symlink_to(moved)
        (tmp_path / "shortcut").symlink_to(cache)
        assert self.find(tmp_path / "shortcut")

    @pytest.mark.parametrize("name", [WEIGHTS, "1_Pooling/config.json", "README.md"])
    def test_out_of_the_cache_are_refused(self, cache: Path, tmp_path: Path, name: str) -> None:
        outside = tmp_path / "outside"
        outside.write_text("{}")
        link = self.snapshot(cache) / name
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        with pytest.raises(ValueError, match=re.escape(f"{link} is a link out of the cache")):
            self.find(cache)

    def test_by_way_of_a_blob_are_refused(self, cache: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_text("{}")
        blob = (self.snapshot(cache) / "config.json").resolve()
        blob.unlink()
        blob.symlink_to(outside)
        with pytest.raises(ValueError, match=r"config\.json is a link out of the cache"):
            self.find(cache)

    def test_to_a_folder_are_refused(self, cache: Path, folder: Path) -> None:
        link = self.snapshot(cache) / "1_Pooling"
        shutil.rmtree(link)
        link.symlink_to(folder / "1_Pooling")
        with pytest.raises(ValueError, match="1_Pooling is a link out of the cache"):
            self.find(cache)

    def test_in_a_folder_of_the_users_own_are_his_business(
        self, folder: Path, tmp_path: Path, tiny: BGEM3Embeddings
    ) -> None:
        (folder / WEIGHTS).rename(tmp_path / "elsewhere.bin")
        (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.bin")
        assert load(folder).embed_query(TEXT) == tiny.embed_query(TEXT)
