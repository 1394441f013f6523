"""Passages of a Chroma collection that may answer a query, and their scores so far.

Knows no model: vectors in, documents out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import Document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb import Collection
    from numpy.typing import NDArray
    from typing_extensions import Self


@dataclass
class Candidates:
    """`N` passages; every list and array has one entry each.

    Attributes:
        ids: Their ids in the collection.
        texts: What is stored there.
        metadatas: What is stored there.
        relevance: What they are ordered by, `(N,)`.
        scores: Scores by signal, `(N,)` each.
    """

    ids: list[str]
    texts: list[str]
    metadatas: list[Mapping[str, Any]]
    relevance: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def nearest(
        cls,
        collection: Collection,
        vector: NDArray[np.float32],
        count: int,
        where: Mapping[str, Any] | None,
    ) -> Self:
        """The passages with the nearest dense vectors.

        Args:
            collection: In cosine space.
            vector: The query's, `(D,)`.
            count: How many.
            where: Chroma's metadata filter.
        """
        found: Any = collection.query(
            query_embeddings=[vector],  # type: ignore[arg-type]
            n_results=count,
            where=where,  # type: ignore[arg-type]
            include=["documents", "metadatas", "distances"],
        )
        [distances] = found["distances"]
        made = cls(
            found["ids"][0],
            [text or "" for text in found["documents"][0]],
            [metadata or {} for metadata in found["metadatas"][0]],
            np.zeros(len(distances), np.float32),
        )
        made.scores["dense"] = 1 - np.array(distances, np.float32)  # (N,)
        return made

    def add(
        self,
        collection: Collection,
        ids: Sequence[str],
        vector: NDArray[np.float32],
        where: Mapping[str, Any] | None,
    ) -> None:
        """Add passages by their ids, those that are still there and pass the filter."""
        known = set(self.ids)
        new = [passage for passage in ids if passage not in known]
        if not new:
            return
        found: Any = collection.get(
            ids=new,
            where=where,  # type: ignore[arg-type]
            include=["documents", "metadatas", "embeddings"],
        )
        if not found["ids"]:
            return
        self.ids += found["ids"]
        self.texts += [text or "" for text in found["documents"]]
        self.metadatas += [metadata or {} for metadata in found["metadatas"]]
        dense = _cosines(np.asarray(found["embeddings"], np.float32), vector)
        self.scores["dense"] = np.concatenate([self.scores["dense"], dense])  # (N,)
        self.relevance = np.zeros(len(self.ids), np.float32)  # (N,)

    def best(self, count: int) -> Candidates:
        """The most relevant ones, the best first."""
        order = np.argsort(-self.relevance, kind="stable")[:count]  # (count,)
        numbers = order.tolist()
        return Candidates(
            [self.ids[n] for n in numbers],
            [self.texts[n] for n in numbers],
            [self.metadatas[n] for n in numbers],
            self.relevance[order],
            {signal: values[order] for signal, values in self.scores.items()},
        )

    def documents(self) -> list[Document]:
        """As documents, with `relevance_score` and each signal's score in their metadata."""
        named = {f"{signal}_score": values for signal, values in self.scores.items()}
        named["relevance_score"] = self.relevance
        return [
            Document(
                text,
                id=passage,
                metadata={**metadata, **{name: float(v[n]) for name, v in named.items()}},
            )
            for n, (passage, text, metadata) in enumerate(
                zip(self.ids, self.texts, self.metadatas, strict=True)
            )
        ]


def _cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of `(N, D)` vectors and a `(D,)` one, `(N,)`; 0 where one has no length."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)  # (N,)
    cosines: NDArray[np.float32] = vectors @ query / np.maximum(norms, np.float32(1e-12))  # (N,)
    return cosines
