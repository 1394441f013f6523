"""Memory that runs out, non-finite values, and one forward pass a batch, in every dtype."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from reference import flag_model
from safetensors.torch import load_file, save_file

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.encoder import Encoder, is_out_of_memory
from langchain_bge_dense._engine.encoding import Outputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERYTHING = Outputs(dense=True, lexical=True, colbert=True)
NAMES = ("dense", "lexical", "colbert")
TEXTS = ["a", "free and equal", "", "rights", "b c"]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def embeddings(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> BGEM3Embeddings:
    return BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype=request.param)


@pytest.fixture(scope="module")
def encoder(embeddings: BGEM3Embeddings) -> Encoder:
    return embeddings.load()._engine.encoder


class Layers(torch.nn.Module):
    """Stands before the layers of an encoder, and notes the lengths of each pass."""

    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.passes: list[list[int]] = []

    def forward(self, batch: list[np.ndarray]) -> torch.Tensor:
        self.passes.append([len(ids) for ids in batch])
        return self.layers(batch)


class Memory(Layers):
    """A device that holds so many texts."""

    texts = 2
    message = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def forward(self, batch: list[np.ndarray]) -> torch.Tensor:
        states = super().forward(batch)
        if len(batch) > self.texts:
            raise torch.OutOfMemoryError(self.message)
        return states


class Overflow(Layers):
    """A dtype in which texts of one length overflow."""

    def __init__(self, layers: torch.nn.Module, length: int, value: float) -> None:
        super().__init__(layers)
        self.length = length
        self.value = value

    def forward(self, batch: list[np.ndarray]) -> torch.Tensor:
        states = super().forward(batch).clone()
        parts = torch.split(states, [len(ids) for ids in batch])
        for part in parts:
            if len(part) == self.length:
                part[0, 3] = self.value
        return states


@pytest.fixture
def behind(encoder: Encoder) -> Iterator:
    """Puts layers of a test before those of the encoder."""
    own = encoder._layers

    def put(kind: type[Layers], *args: object) -> Layers:
        encoder._layers = kind(own, *args)
        return encoder._layers

    yield put
    encoder._layers = own


def batch(encoder: Encoder, *texts: str) -> list[np.ndarray]:
    return [tokens.ids for tokens in encoder.tokenize(texts, 512)]


@pytest.mark.parametrize(
    ("texts", "passes"), [(2, [5, 2, 3, 1, 2]), (1, [5, 2, 1, 1, 3, 1, 2, 1, 1])]
)
def test_out_of_memory_halves_the_batch(
    encoder: Encoder, embeddings: BGEM3Embeddings, behind, texts: int, passes: list[int]
) -> None:
    ids = batch(encoder, *TEXTS)
    memory = behind(Memory)
    memory.texts = texts
    halved = encoder.forward(ids, EVERYTHING)
    memory.texts = 5
    whole = encoder.forward(ids, EVERYTHING)
    assert [len(lengths) for lengths in memory.passes] == [*passes, 5]
    tolerance = 1e-5 if embeddings.dtype == "float32" else 0.1
    for ours, theirs in zip(halved, whole, strict=True):
        for name in NAMES:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=tolerance)


def test_one_text_too_large_gives_its_own_error(encoder: Encoder, behind) -> None:
    memory = behind(Memory)
    memory.texts = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        encoder.forward(batch(encoder, "a", "b", "c"), EVERYTHING)
    assert [len(lengths) for lengths in memory.passes] == [3, 1]


class Broken(Layers):
    def forward(self, batch: list[np.ndarray]) -> torch.Tensor:
        super().forward(batch)
        msg = "mat1 and mat2 shapes cannot be multiplied"
        raise RuntimeError(msg)


def test_another_error_is_raised_as_it_is_and_nothing_is_tried_again(
    encoder: Encoder, behind
) -> None:
    broken = behind(Broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        encoder.forward(batch(encoder, "a", "b"), EVERYTHING)
    assert [len(lengths) for lengths in broken.passes] == [2]


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, *, counts: bool) -> None:
    assert is_out_of_memory(error) == counts


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is of Linux")
def test_the_systems_own_message_counts_as_out_of_memory() -> None:
    code = (
        "import resource, torch\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n    torch.empty(8 << 30, dtype=torch.uint8)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert is_out_of_memory(RuntimeError(done.stdout))


def test_each_text_takes_part_in_one_forward_pass(embeddings: BGEM3Embeddings, behind) -> None:
    layers = behind(Layers)
    budget = embeddings.load()._engine.encoder.batch_tokens
    texts = [f"{'free ' * (index % 9)}" for index in range(500)]
    counts = embeddings.encode(texts, lexical=True, colbert=True).token_counts
    assert sorted(chain.from_iterable(layers.passes)) == sorted(counts.tolist())
    assert all(sum(lengths) <= budget for lengths in layers.passes)
    assert len(layers.passes) <= 2 * counts.sum() / budget + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_texts_are_computed_again_in_float32(
    encoder: Encoder, behind, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    if encoder.reference is None:
        pytest.skip("float32 is what would be computed again")
    ids = batch(encoder, *TEXTS, *TEXTS)
    loads, load = [], encoder.reference
    expected = load().forward(ids, EVERYTHING)
    length = len(ids[1])
    behind(Overflow, length, value)

    def counted() -> Encoder:
        loads.append(1)
        return load()

    encoder.reference = counted
    try:
        rows = encoder.forward(ids, EVERYTHING)
    finally:
        encoder.reference = load
    assert len(loads) == 1
    assert "2 of a batch's 10 texts have non-finite values" in caplog.text
    for text, row, exact in zip(ids, rows, expected, strict=True):
        again = len(text) == length
        assert np.allclose(row.dense, exact.dense, atol=1e-6) == again
        assert all(np.isfinite(getattr(row, name)).all() for name in NAMES)


@pytest.mark.parametrize(
    "outputs", [{}, {"dense": False, "lexical": True}, {"dense": False, "colbert": True}]
)
def test_non_finite_in_float32_too_is_never_returned(
    tiny_checkpoint: Path, tmp_path: Path, embeddings: BGEM3Embeddings, outputs: dict[str, bool]
) -> None:
    folder = scaled(tiny_checkpoint, tmp_path / "broken", NORM, float("nan"))
    broken = BGEM3Embeddings(model=folder, device="cpu", dtype=embeddings.dtype)
    with pytest.raises(
        FloatingPointError, match=r"Text [01] has a non-finite vector, in float32 too"
    ):
        broken.encode(["free", "equal"], **outputs)


def test_a_non_finite_text_behind_the_first_window_is_named_by_its_index(
    tiny_checkpoint: Path,
) -> None:
    own = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype="float32", pooling="mean")
    encoder = own.load()._engine.encoder
    [long] = batch(encoder, "free and equal")
    encoder._layers = Overflow(encoder._layers, len(long), float("nan"))
    texts = ["a"] * 2_100 + ["free and equal"] + ["a"] * 100
    with pytest.raises(FloatingPointError, match="Text 2100 has a non-finite vector"):
        own.embed_documents(texts)
    with pytest.raises(FloatingPointError, match="Text 2100 has a non-finite vector"):
        list(own.embed_stream(texts))
    assert len(own.embed_query("a")) == 32


NORM = "encoder.layer.1.output.LayerNorm"
OUTPUT = "encoder.layer.0.attention.output.dense"


def test_an_overflow_of_float16_is_computed_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = scaled(tiny_checkpoint, tmp_path / "large", OUTPUT, 1e5)
    texts = ["free and equal", "rights"]
    half, exact = (
        BGEM3Embeddings(model=folder, device="cpu", dtype=dtype) for dtype in ("float16", "float32")
    )
    encoder = half.load()._engine.encoder
    overflown = encoder._forward(batch(encoder, *texts), Outputs())
    assert not any(np.isfinite(row.dense).all() for row in overflown)
    vectors = half.encode(texts, lexical=True, colbert=True)
    np.testing.assert_allclose(vectors.dense, exact.encode(texts).dense, atol=1e-6)


def scaled(checkpoint: Path, folder: Path, module: str, factor: float) -> Path:
    """A copy in which the weights of one module are so much larger."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"{module}.{name}"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_wrapped_model_is_computed_again_from_its_own_weights(tiny_checkpoint: Path) -> None:

    flag = flag_model(tiny_checkpoint)
    flag.model.half()
    from langchain_bge_dense._engine.checkpoint import read_checkpoint
    from langchain_bge_dense._engine.loading import wrap_flag_model

    checkpoint = read_checkpoint(tiny_checkpoint, "tiny")
    encoder = wrap_flag_model(flag, checkpoint, "cpu", "float16")
    [expected] = encoder.reference().forward(batch(encoder, "free"), Outputs())
    encoder._layers = Overflow(encoder._layers, len(batch(encoder, "free")[0]), float("inf"))
    [row] = encoder.forward(batch(encoder, "free"), Outputs())
    np.testing.assert_array_equal(row.dense, expected.dense)
    assert next(flag.model.parameters()).dtype == torch.float16
