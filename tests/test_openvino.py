"""The encoder that OpenVINO runs, against the one that PyTorch runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tiny_m3 import build

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._loading import cpu_has_bf16
from langchain_bge_dense._openvino import OpenVinoEncoder, supports

if TYPE_CHECKING:
    from pathlib import Path

    import torch

TEXTS = [
    "",
    "a",
    "检索增强生成",
    "passage " * 40,
    "a passage and its query " * 50,
    "two words",
    "two words",
    "🙂 مرحبا",
]
ALL = {"dense": True, "lexical": True, "colbert": True}

# Lowest cosine to PyTorch's float32: of random weights on short texts, and of weights with meaning.
DTYPES = [("float32", 0.999999), ("bfloat16", 0.999), ("int8", 0.998)]


def load(model: Path, cache: Path, dtype: str = "float32", **settings: object) -> BGEM3Embeddings:
    fields = {"device": "cpu", "backend": "openvino", "cache_folder": str(cache), **settings}
    return BGEM3Embeddings(model=str(model), dtype=dtype, **fields).load()


def encoder_of(embeddings: BGEM3Embeddings) -> torch.nn.Module:
    return embeddings._engine.encoder._model.model


def entry_of(cache: Path) -> Path:
    [sums] = cache.rglob("sums.json")
    return sums.parent


def test_float32_equals_pytorch(tiny, tiny_checkpoint, tmp_path):
    ours = load(tiny_checkpoint, tmp_path).encode(TEXTS, **ALL)
    theirs = tiny.encode(TEXTS, **ALL)
    assert np.abs(ours.dense - theirs.dense).max() < 1e-6
    for one, other in zip(ours.lexical, theirs.lexical, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, abs=1e-5)
    for one, other in zip(ours.colbert, theirs.colbert, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max(initial=0) < 1e-4
    assert not list(tmp_path.rglob("*.bin"))  # float32 has nothing to convert


@pytest.mark.parametrize(("dtype", "lowest"), DTYPES)
def test_every_dtype_is_close_to_float32(tiny, tiny_checkpoint, tmp_path, dtype, lowest):
    ours = load(tiny_checkpoint, tmp_path, dtype)
    cosines = (ours.encode(TEXTS).dense * tiny.encode(TEXTS).dense).sum(axis=1)
    assert cosines.min() > lowest


@pytest.mark.parametrize(("dtype", "lowest"), DTYPES)
def test_bert_with_mean_pooling_works_too(small, small_checkpoint, tmp_path, dtype, lowest):
    texts = ["A cross-encoder reads query and passage together.", "bees", "How do bees make honey?"]
    ours = load(small_checkpoint, tmp_path, dtype)
    cosines = (ours.encode(texts).dense * small.encode(texts).dense).sum(axis=1)
    assert cosines.min() > lowest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_batch_mates_and_padding_do_not_change_a_result(tiny_checkpoint, tmp_path, dtype):
    ours = load(tiny_checkpoint, tmp_path, dtype)
    together = ours.encode(TEXTS).dense
    alone = np.concatenate([ours.encode([text]).dense for text in TEXTS])
    assert (together * alone).sum(axis=1).min() > (0.999999 if dtype == "float32" else 0.9999)


def test_the_layers_of_pytorch_are_let_go(tiny_checkpoint, tmp_path):
    encoder = encoder_of(load(tiny_checkpoint, tmp_path))
    assert isinstance(encoder, OpenVinoEncoder)
    assert {name.partition(".")[0] for name, _ in encoder.named_parameters()} == {"embeddings"}


def test_auto_takes_it_on_a_cpu(tiny_checkpoint, tmp_path):
    embeddings = load(tiny_checkpoint, tmp_path, "auto", backend="auto")
    assert isinstance(encoder_of(embeddings), OpenVinoEncoder)
    assert len(list(tmp_path.rglob("model.bin"))) == cpu_has_bf16()


@pytest.fixture
def relu(tmp_path):
    folder = build(tmp_path / "relu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    return folder


def test_auto_takes_pytorch_for_an_encoder_of_another_kind(relu, tiny_checkpoint, tmp_path):
    assert supports(tiny_checkpoint)
    embeddings = load(relu, tmp_path, backend="auto")
    assert not isinstance(encoder_of(embeddings), OpenVinoEncoder)


def test_an_encoder_of_another_kind_is_an_error_where_it_is_asked_for(relu, tmp_path):
    with pytest.raises(ValueError, match=r"cannot run an encoder of type 'xlm-roberta' \(only"):
        load(relu, tmp_path)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def changed(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def gone(file):
    file.unlink()


class TestCache:
    """Converted layers are kept, and trusted only while they are whole."""

    @pytest.fixture
    def converted(self, tiny_checkpoint, tmp_path):
        vector = load(tiny_checkpoint, tmp_path, "int8").embed_query("a passage")
        return entry_of(tmp_path), vector

    def test_the_next_start_converts_nothing(self, tiny_checkpoint, tmp_path, converted, caplog):
        entry, vector = converted
        caplog.set_level(logging.INFO, "langchain_bge_dense")
        written = (entry / "model.bin").stat()
        assert load(tiny_checkpoint, tmp_path, "int8").embed_query("a passage") == vector
        assert (entry / "model.bin").stat() == written
        assert "Converting" not in caplog.text

    @pytest.mark.parametrize("name", ["model.bin", "model.xml", "sums.json"])
    @pytest.mark.parametrize("damage", [cut, changed, gone])
    def test_a_damaged_entry_is_made_again(self, tiny_checkpoint, converted, caplog, name, damage):
        entry, vector = converted
        tmp_path = entry.parents[2]
        damage(entry / name)
        caplog.set_level(logging.INFO, "langchain_bge_dense")
        assert load(tiny_checkpoint, tmp_path, "int8").embed_query("a passage") == vector
        assert "Converting" in caplog.text

    def test_another_checkpoint_has_an_entry_of_its_own(self, tmp_path, converted):
        other = load(build(tmp_path / "other", seed=1), tmp_path, "int8")
        assert other.embed_query("a passage") != converted[1]
        assert len(list(tmp_path.rglob("sums.json"))) == 2

    def test_a_copy_of_the_checkpoint_shares_it(self, tiny_checkpoint, tmp_path, converted):
        copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
        assert load(copy, tmp_path, "int8").embed_query("a passage") == converted[1]
        assert len(list(tmp_path.rglob("sums.json"))) == 1

    def test_a_folder_that_cannot_be_written_costs_the_cache_alone(
        self, tiny_checkpoint, tmp_path, converted, caplog
    ):
        (tmp_path / "file").write_text("")
        ours = load(tiny_checkpoint, tmp_path / "file", "int8")
        assert ours.embed_query("a passage") == converted[1]
        assert "Pass a folder that can be written to as `cache_folder`" in caplog.text


def test_a_vector_that_is_not_finite_is_computed_again(tiny, tiny_checkpoint, tmp_path):
    ours = load(tiny_checkpoint, tmp_path)
    encoder = encoder_of(ours)
    run = encoder.forward

    def overflowing(**inputs):
        output = run(**inputs)
        output.last_hidden_state[0] = float("inf")
        return output

    encoder.forward = overflowing
    assert np.abs(ours.encode(TEXTS).dense - tiny.encode(TEXTS).dense).max() < 1e-6
    assert encoder_of(ours) is encoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_are_not_finite_are_an_error(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    folder = build(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="Text 0 has a vector that is not finite"):
        load(folder, tmp_path, dtype).embed_query("a passage")


WITHOUT = """
import sys
sys.modules["openvino"] = None
import importlib.util
from langchain_bge_dense import BGEM3Embeddings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *of: None if name == "openvino" else find(name, *of)
auto = BGEM3Embeddings(model=sys.argv[1], device="cpu")
print(len(auto.embed_query("text")))
try:
    BGEM3Embeddings(model=sys.argv[1], device="cpu", backend="openvino").load()
except ImportError as error:
    print(error)
"""


def test_without_openvino(tiny_checkpoint):
    command = [sys.executable, "-c", WITHOUT, str(tiny_checkpoint)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    width, error = ran.stdout.splitlines()
    assert width == "32"
    assert 'pip install "langchain-bge-dense[openvino]"' in error


def test_its_telemetry_is_not_imported(tiny_checkpoint, tmp_path):
    code = (
        "import sys; from langchain_bge_dense import BGEM3Embeddings;"
        "BGEM3Embeddings(model=sys.argv[1], backend='openvino', dtype='int8').embed_query('a');"
        "print('openvino' in sys.modules, 'openvino_telemetry' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.split() == ["True", "False"]
    assert ran.stderr == ""
