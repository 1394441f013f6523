"""Memory that runs out, numbers that are not finite, and one forward pass a batch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._encoder import Encoder, Signals, is_out_of_memory, to_host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERYTHING = Signals(dense=True, lexical=True, colbert=True)


@pytest.fixture(scope="module")
def encoder(tiny: BGEM3Embeddings) -> Encoder:
    return tiny.load()._engine.encoder


class Memory(torch.nn.Module):
    """An encoder on a device that holds so many texts, and counts its passes."""

    def __init__(self, encoder: torch.nn.Module, texts: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.texts = texts
        self.passes: list[tuple[int, ...]] = []

    def forward(self, **inputs: torch.Tensor) -> object:
        shape = inputs["input_ids"].shape
        self.passes.append(tuple(shape))
        if shape[0] > self.texts:
            msg = "CUDA out of memory. Tried to allocate 2.00 GiB"
            raise torch.OutOfMemoryError(msg)
        return self.encoder(**inputs)


@pytest.fixture
def memory(encoder: Encoder) -> Iterator[Memory]:
    memory = Memory(encoder._model.model, texts=2)
    encoder._model.model = memory
    yield memory
    encoder._model.model = memory.encoder


def batch(encoder: Encoder, *texts: str) -> list[np.ndarray]:
    return [tokens.ids for tokens in encoder.tokenize(texts, 512)]


def test_out_of_memory_halves_the_batch(encoder: Encoder, memory: Memory) -> None:
    ids = batch(encoder, "a", "free and equal", "", "rights", "b c")
    halved = to_host(encoder.forward(ids, EVERYTHING))
    memory.texts = 5
    whole = to_host(encoder.forward(ids, EVERYTHING))
    assert [rows for rows, _ in memory.passes] == [5, 2, 3, 1, 2, 5]
    np.testing.assert_allclose(halved.dense, whole.dense, atol=1e-5)
    for ours, theirs in zip(halved.colbert, whole.colbert, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_one_text_too_large_gives_its_own_error(encoder: Encoder, memory: Memory) -> None:
    memory.texts = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        encoder.forward(batch(encoder, "a", "b"), EVERYTHING)


def test_other_errors_are_not_caught(encoder: Encoder) -> None:
    broken = np.array([0, 10**6, 2], dtype=np.int32)
    with pytest.raises((IndexError, RuntimeError)):
        encoder.forward([broken, broken], EVERYTHING)


def test_the_systems_own_message_counts_as_out_of_memory() -> None:
    code = (
        "import resource, torch\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n    torch.empty(8 << 30, dtype=torch.uint8)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert is_out_of_memory(RuntimeError(done.stdout))


def test_each_text_takes_part_in_one_forward_pass(tiny: BGEM3Embeddings, memory: Memory) -> None:
    memory.texts = 10**6
    texts = [f"{'free ' * (index % 9)}" for index in range(50)]
    tiny.encode(texts, lexical=True, colbert=True)
    assert sum(rows for rows, _ in memory.passes) == 50
    assert all(rows * length <= 512 for rows, length in memory.passes)


def test_an_overflow_in_half_precision_is_computed_again_in_float32(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = scaled(tiny_checkpoint, tmp_path / "large", 4.5e4)
    texts = ["free and equal", "rights"]
    settings = {"model": folder, "device": "cpu", "backend": "torch"}
    half = BGEM3Embeddings(dtype="float16", **settings)
    exact = BGEM3Embeddings(dtype="float32", **settings)
    encoder = half.load()._engine.encoder
    ids = batch(encoder, *texts)
    overflown = to_host(encoder.forward(ids, Signals())).dense
    assert not np.isfinite(overflown).all(axis=1).any()
    vectors = half.encode(texts, lexical=True, colbert=True)
    assert np.isfinite(vectors.dense).all()
    assert (vectors.dense * exact.encode(texts).dense).sum(axis=1).min() > 0.99
    assert next(encoder._model.parameters()).dtype == torch.float16


def scaled(checkpoint: Path, folder: Path, factor: float) -> Path:
    """A copy whose last layer norm, and so every vector, is so much larger."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"encoder.layer.1.output.LayerNorm.{name}"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("signals", [{}, {"dense": False, "lexical": True}, {"colbert": True}])
def test_what_is_not_finite_in_float32_either_is_never_returned(
    tiny_checkpoint: Path, tmp_path: Path, signals: dict[str, bool]
) -> None:
    folder = scaled(tiny_checkpoint, tmp_path / "broken", float("nan"))
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype="float32", backend="torch")
    with pytest.raises(FloatingPointError, match="Text 0 has a vector that is not finite"):
        embeddings.encode(["free", "equal"], **signals)
