"""What belongs to the passages of a collection beside their texts and vectors.

Most kinds are a second collection of the same database, so that they work wherever Chroma does and
stay out of everybody's metadata. The store keeps all kinds in step with its documents: `add` comes
before a passage is stored, and `remove` after it is deleted or has another text. Keys name passage
and text, so that a process killed in between leaves entries too many, which do no harm, and never
too few.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chromadb import Collection
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.connection import Connection

    Replace = Callable[[Collection, Callable[[Collection], None]], None]

_PAGE = 1_000  # passages looked up at once
_HASH = 16  # characters of a key behind the id


class Encoded(NamedTuple):
    """What a model makes of `N` passages."""

    vectors: NDArray[np.float32]  # (N, D)
    lexical: Sequence[Mapping[int, float]] | None = None
    truncated_at: Sequence[int | None] | None = None
    """For each passage the `max_length` that cut it, 0 for the model's own; None: it is whole."""
    tokens: int = 0
    colbert: Sequence[bytes] | None = None
    """Codes of each passage."""

    @property
    def truncated(self) -> int:
        """How many passages were cut."""
        return sum(length is not None for length in self.truncated_at or ())

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """What was made of the passages of several calls that asked for the same."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def column(values: Sequence[Any]) -> Any:
            return None if values[0] is None else [row for part in values for row in part]

        return cls(
            np.concatenate([part.vectors for part in parts]),
            column([part.lexical for part in parts]),
            column([part.truncated_at for part in parts]),
            sum(part.tokens for part in parts),
            column([part.colbert for part in parts]),
        )


class Companion(ABC):
    """One kind of data that belongs to passages.

    Args:
        connection: Of the store.
        uid: Of its passages.
    """

    kind: ClassVar[str]
    """Last part of its name."""

    def __init__(self, connection: Connection, uid: str) -> None:
        self.connection = connection
        self.name = f"{uid}.{self.kind}"

    @abstractmethod
    def add(self, keys: Sequence[str], encoded: Encoded) -> None:
        """Write what belongs to passages, before they are stored."""

    @abstractmethod
    def remove(self, keys: Sequence[str]) -> None:
        """Forget passages, after they were deleted or replaced."""

    @abstractmethod
    def compact(self, keys: Sequence[str], replace: Replace) -> None:
        """Forget all but these passages, and leave nothing of the others in any file.

        Args:
            keys: Of the passages that are stored.
            replace: Puts a new collection, which a function fills, in the place of one.
        """

    @abstractmethod
    def drop(self) -> None:
        """Delete all."""


class CollectionCompanion(Companion):
    """A companion that is a collection of the same database."""

    def __init__(self, connection: Connection, uid: str) -> None:
        super().__init__(connection, uid)
        self._opened: Collection | None = None
        self._generation = -1

    @abstractmethod
    def write_compact(self, target: Collection, keys: Sequence[str]) -> None:
        """Write what belongs to these passages to a new collection; there are no others."""

    def compact(self, keys: Sequence[str], replace: Replace) -> None:
        """Write a new collection."""
        collection = self.collection()
        if collection is not None and collection.count():
            replace(collection, lambda copy: self.write_compact(copy, keys))
            self.forget()

    def drop(self) -> None:
        """Delete the collection."""
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
        columns: Any = {"ids": ids, "embeddings": no_vectors(len(ids)), "metadatas": metadatas}
        collection = partial(self.collection, create=True)
        self.connection.write(collection, len(ids), lambda c: c.upsert(**columns))

    def _delete(self, ids: Sequence[str]) -> None:
        if ids and self.collection() is not None:
            self.connection.write(self.collection, len(ids), lambda c: c.delete(ids=list(ids)))


def key_of(passage: str, text: str) -> str:
    """The key of what was computed of a passage: its id, and sixty-four bits of its text.

    >>> key_of("a", "one")
    'a34f2ddaa8b7615c9'
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return passage + digest.hexdigest()


def passage_of(key: str) -> str:
    """The id in a key.

    >>> passage_of("a34f2ddaa8b7615c9")
    'a'
    """
    return key[:-_HASH]


def no_vectors(count: int) -> NDArray[np.float32]:
    """What Chroma stores as vectors where there are none, `(count, 1)`."""
    return np.ones((count, 1), np.float32)


class Truncations(CollectionCompanion):
    """Which passages were cut, and where: more room makes them worth embedding again."""

    kind = "truncated"

    def lengths(self, keys: Sequence[str]) -> dict[str, int]:
        """The `max_length` that cut a passage, of those that were cut; 0 for the model's own."""
        collection = self.collection()
        if collection is None or not keys:
            return {}
        found = collection.get(ids=list(keys), include=["metadatas"])
        lengths = (int(entry["max_length"]) for entry in found["metadatas"] or [])  # type: ignore[arg-type]
        return dict(zip(found["ids"], lengths, strict=True))

    def add(self, keys: Sequence[str], encoded: Encoded) -> None:
        """Write which passages were cut."""
        lengths = dict(zip(keys, encoded.truncated_at or (), strict=False))
        cut = {key: length for key, length in lengths.items() if length is not None}
        if cut:
            self._upsert(list(cut), [{"max_length": length} for length in cut.values()])

    def remove(self, keys: Sequence[str]) -> None:
        """Forget passages that are deleted, or whole by now."""
        self._delete(list(self.lengths(keys)))

    def write_compact(self, target: Collection, keys: Sequence[str]) -> None:
        """Write the lengths of passages that are stored."""
        for page in batch_iterate(_PAGE, keys):
            lengths = self.lengths(page)
            if lengths:
                metadatas: Any = [{"max_length": length} for length in lengths.values()]
                vectors = no_vectors(len(lengths))
                target.upsert(ids=list(lengths), embeddings=vectors, metadatas=metadatas)
