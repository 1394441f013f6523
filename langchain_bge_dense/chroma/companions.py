"""What belongs to the passages of a collection beside their texts and vectors.

Each kind is a second collection of the same database, so that it works wherever Chroma does and
stays out of everybody's metadata. The store keeps all kinds in step with its documents: `add` comes
before a passage is stored and `remove` after it is deleted, so that a process killed in between
leaves entries too many, which do no harm, and never too few.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb import Collection
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.connection import Connection

_PAGE = 1_000  # passages looked up at once


class Encoded(NamedTuple):
    """What a model makes of `N` passages."""

    vectors: NDArray[np.float32]  # (N, D)
    lexical: Sequence[Mapping[int, float]] | None = None
    truncated_at: Sequence[int | None] | None = None
    """For each passage the `max_length` that cut it, 0 for the model's own; None: it is whole."""
    tokens: int = 0

    @property
    def truncated(self) -> int:
        """How many passages were cut."""
        return sum(length is not None for length in self.truncated_at or ())


class Companion(ABC):
    """One kind of data that belongs to passages.

    Args:
        connection: Of the store.
        uid: Of its passages.
    """

    kind: ClassVar[str]
    """Last part of its collection's name."""

    def __init__(self, connection: Connection, uid: str) -> None:
        self.connection = connection
        self.name = f"{uid}.{self.kind}"
        self._opened: Collection | None = None
        self._generation = -1

    @abstractmethod
    def add(self, ids: Sequence[str], texts: Sequence[str], encoded: Encoded) -> None:
        """Write what belongs to passages, before they are stored."""

    @abstractmethod
    def remove(self, ids: Sequence[str]) -> None:
        """Forget passages, after they were deleted."""

    @abstractmethod
    def write_compact(self, target: Collection, ids: Sequence[str]) -> None:
        """Write what belongs to these passages to a new collection; there are no others."""

    def drop(self) -> None:
        """Delete all."""
        with contextlib.suppress(NotFoundError):
            self.connection.client.delete_collection(self.name)
        self.forget()

    def forget(self) -> None:
        """Drop what was read."""
        self._opened = None

    def collection(self, *, create: bool = False) -> Collection | None:
        """Where it is stored; None: there is nothing yet."""
        if self._opened is None or self._generation != self.connection.generation:
            self._generation = self.connection.generation
            self._opened = self.connection.collection(self.name, create=create)
        return self._opened

    def _upsert(self, ids: Sequence[str], metadatas: Sequence[Mapping[str, Any]]) -> None:
        collection = self.collection(create=True)
        columns: Any = {"ids": ids, "embeddings": no_vectors(len(ids)), "metadatas": metadatas}
        self.connection.write(collection, len(ids), lambda c: c.upsert(**columns))


def no_vectors(count: int) -> NDArray[np.float32]:
    """What Chroma stores as vectors where there are none, `(count, 1)`."""
    return np.ones((count, 1), np.float32)


class Truncations(Companion):
    """Which passages were cut, and where: more room makes them worth embedding again."""

    kind = "truncated"

    def lengths(self, ids: Sequence[str]) -> dict[str, int]:
        """The `max_length` that cut a passage, of those that were cut; 0 for the model's own."""
        collection = self.collection()
        if collection is None or not ids:
            return {}
        found = collection.get(ids=list(ids), include=["metadatas"])
        lengths = (int(entry["max_length"]) for entry in found["metadatas"] or [])  # type: ignore[arg-type]
        return dict(zip(found["ids"], lengths, strict=True))

    def add(self, ids: Sequence[str], texts: Sequence[str], encoded: Encoded) -> None:  # noqa: ARG002
        """Write which passages were cut."""
        lengths = dict(zip(ids, encoded.truncated_at or [None] * len(ids), strict=True))
        cut = {passage: length for passage, length in lengths.items() if length is not None}
        if cut:
            self._upsert(list(cut), [{"max_length": length} for length in cut.values()])
        self.remove([passage for passage in ids if passage not in cut])

    def remove(self, ids: Sequence[str]) -> None:
        """Forget passages that are deleted, or whole by now."""
        collection = self.collection()
        stored = list(self.lengths(ids))
        if collection is not None and stored:
            self.connection.write(collection, len(stored), lambda c: c.delete(ids=stored))

    def write_compact(self, target: Collection, ids: Sequence[str]) -> None:
        """Write the lengths of passages that are stored."""
        for page in batch_iterate(_PAGE, ids):
            lengths = self.lengths(page)
            if lengths:
                metadatas: Any = [{"max_length": length} for length in lengths.values()]
                vectors = no_vectors(len(lengths))
                target.upsert(ids=list(lengths), embeddings=vectors, metadatas=metadatas)
