"""What tests of many calls at once share: texts, a comparison of vectors, the model's threads."""

from __future__ import annotations

import threading

import numpy as np

WORDS = ("all", "human", "beings", "are", "born", "free", "and", "equal", "in", "dignity")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]


def alike(vectors: list[list[float]], others: list[list[float]]) -> bool:
    return np.allclose(vectors, others, rtol=0, atol=1e-6)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("bge-m3")}
