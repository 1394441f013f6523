"""Embeddings without a model, which change in the last digits with the texts of a batch."""

from __future__ import annotations

import hashlib

import numpy as np
from langchain_core.embeddings import Embeddings


class HashedEmbeddings(Embeddings):
    """Unit vectors from a hash of the text, and a hair of the batch: as real models round.

    Args:
        dimension: Width of a vector.
        model: Changes all vectors.
    """

    def __init__(self, dimension: int = 8, model: str = "hash") -> None:
        self.dimension = dimension
        self.model = model
        self.batches: list[list[str]] = []

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.batches.append(list(texts))
        hair = 1e-5 * self._vector("\n".join(texts))
        vectors = np.array([self._vector(text) + hair for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self._vector(text).tolist()

    @property
    def embedded(self) -> int:
        return sum(map(len, self.batches))

    def _vector(self, text: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.model} {text}".encode()).digest()
        vector = np.random.default_rng(list(digest)).standard_normal(self.dimension)
        return vector / np.linalg.norm(vector)
