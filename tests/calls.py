"""What tests of many calls at once share: texts, comparisons, a gate before the model."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from langchain_bge_dense import BGEM3Embeddings
    from langchain_bge_dense._engine.encoding import Outputs, TextOutputs

WAIT = 20.0  # seconds; only a test that fails takes so long

WORDS = ("all", "human", "beings", "are", "born", "free", "and", "equal", "in", "dignity")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]


def alike(vectors: list[list[float]], others: list[list[float]]) -> bool:
    return np.allclose(vectors, others, rtol=0, atol=1e-6)


def lowest_int8_cosine() -> float:
    """To float32, on the tiny checkpoint; CPUs without VNNI have tokens of 7 bits."""
    import torch

    from langchain_bge_dense._engine import linear

    factory = linear.LinearFactory("int8", torch.device("cpu"), torch.float32)
    layer = factory(torch.eye(8), torch.zeros(8))
    return 0.99 if isinstance(layer, linear.PlainInt7Linear) else 0.995


def end_as(before: set[threading.Thread]) -> bool:
    """Whether the model's threads come to be those of before.

    A thread pool lets go of a call a moment after its result is there.
    """
    until = time.monotonic() + WAIT
    while threads() != before and time.monotonic() < until:
        time.sleep(0.02)
    return threads() == before


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("bge-m3")}


class Gate:
    """Stands before an encoder's `forward`: counts texts and batches, and can hold one up."""

    def __init__(self, forward: Callable[..., list[TextOutputs | None]]) -> None:
        self._forward = forward
        self.batches: list[int] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(
        self, batch: list[NDArray[np.int32]], outputs: Outputs
    ) -> list[TextOutputs | None]:
        self.batches.append(len(batch))
        self.entered.set()
        assert self.go_on.wait(WAIT)
        return self._forward(batch, outputs)


@contextmanager
def gated(embeddings: BGEM3Embeddings) -> Iterator[Gate]:
    """Stands before a model that runs here."""
    encoder = embeddings.engine().encoder
    gate = Gate(encoder.forward)
    encoder.forward = gate
    try:
        yield gate
    finally:
        gate.go_on.set()
        del encoder.forward
