"""Lexical weights of the passages of a collection, and the inverted index over them.

Weights are stored as a log: one entry a batch of passages, and one for passages that were deleted
or replaced. Entries are only ever added, until the collection is compacted. Each process that
searches keeps the inverted index in memory, and reads the entries that are new before a search.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chromadb.errors import NotFoundError
from scipy import sparse

from langchain_bge_dense.chroma.companions import CollectionCompanion, no_vectors, passage_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chromadb import Collection
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.companions import Encoded
    from langchain_bge_dense.chroma.connection import Connection

_PAGE = 50  # entries read at once
_ENTRY = 4_096  # passages of an entry that compaction writes
_VOCABULARY = 1 << 18  # rows of a part, more where a token id asks for it


class Batch(NamedTuple):
    """Passages of one entry, `N` of them with `M` weights in all."""

    keys: list[str]
    lengths: NDArray[np.uint32]  # (N,) weights per passage
    tokens: NDArray[np.uint32]  # (M,)
    weights: NDArray[np.float32]  # (M,)

    @classmethod
    def of(cls, keys: Sequence[str], weights: Sequence[Mapping[int, float]]) -> Batch:
        """A batch of passages."""
        return cls(
            list(keys),
            np.array([len(passage) for passage in weights], np.uint32),
            np.array([token for passage in weights for token in passage], np.uint32),
            np.array([value for passage in weights for value in passage.values()], np.float32),
        )

    def pack(self) -> str:
        """As it is stored."""
        stream = io.BytesIO()
        names = np.frombuffer(json.dumps(self.keys).encode(), np.uint8)
        np.savez_compressed(stream, names, *self[1:])
        return base64.b64encode(stream.getvalue()).decode()

    @classmethod
    def unpack(cls, packed: str) -> Batch:
        """What `pack` gave."""
        with np.load(io.BytesIO(base64.b64decode(packed)), allow_pickle=False) as arrays:
            names, *rest = (arrays[f"arr_{number}"] for number in range(len(cls._fields)))
        return cls(json.loads(names.tobytes()), *rest)


def postings(batches: Sequence[Batch]) -> sparse.csr_array:
    """The inverted index of batches: a row a token, a column a passage."""
    lengths = np.concatenate([batch.lengths for batch in batches])  # (N,)
    tokens = np.concatenate([batch.tokens for batch in batches])  # (M,)
    weights = np.concatenate([batch.weights for batch in batches])  # (M,)
    passages = np.repeat(np.arange(len(lengths)), lengths)  # (M,)
    rows = max(_VOCABULARY, int(tokens.max(initial=0)) + 1)
    return sparse.csr_array((weights, (tokens, passages)), shape=(rows, len(lengths)))


def merged(parts: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Parts side by side: the passages of the first come first."""
    rows = max(part.shape[0] for part in parts)
    for part in parts:
        part.resize((rows, part.shape[1]))
    return sparse.hstack(parts, format="csr")


def part_scores(
    part: sparse.csr_array, tokens: NDArray[np.int64], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Lexical scores of the passages of a part, `(N,)`.

    Args:
        part: What `postings` gave.
        tokens: The query's, `(Q,)`.
        weights: Theirs, `(Q,)`.
    """
    known = tokens < part.shape[0]
    scores: NDArray[np.float32] = weights[known] @ part[tokens[known]]  # (N,)
    return scores


class LexicalScores(NamedTuple):
    """Scores of one query, with the tables of the index at that time, which grow and never change.

    Attributes:
        values: By number of the passage, `(N,)`.
        hashes: Of their ids, by number, `(N,)`.
        keys: By number.
        numbers: By key.
    """

    values: NDArray[np.float32]
    hashes: NDArray[np.int64]
    keys: list[str]
    numbers: dict[str, int]

    def ranked(self, count: int, among: Iterable[str] | None = None) -> list[str]:
        """Ids of the passages with the highest scores above 0, the best first.

        Args:
            count: How many.
            among: Ids of the passages that may be among them; None: all.
        """
        best = np.flatnonzero(self.values > 0)
        if among is not None:
            best = best[np.isin(self.hashes[best], list(map(hash, among)))]
        if len(best) > count:
            first = len(best) - count
            best = best[np.argpartition(self.values[best], first)[first:]]  # (count,)
        best = best[np.argsort(-self.values[best], kind="stable")]
        ids = (passage_of(self.keys[number]) for number in best.tolist())
        return list(dict.fromkeys(ids))  # one that is being replaced is there twice

    def of(self, keys: Sequence[str]) -> NDArray[np.float32]:
        """Scores of passages, `(len(keys),)`; one that has no weights of its text scores 0."""
        scores = np.zeros(len(keys), np.float32)
        for place, key in enumerate(keys):
            number = self.numbers.get(key)
            if number is not None and number < len(self.values):
                scores[place] = self.values[number]
        return scores


class LexicalWeights(CollectionCompanion):
    """Lexical weights of a store's passages, searchable; safe to use from several threads.

    Args:
        connection: Of the store.
        uid: Of its passages.
    """

    kind = "lexical"

    def __init__(self, connection: Connection, uid: str) -> None:
        super().__init__(connection, uid)
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Drop what was read."""
        super().forget()
        self._log: object = None
        self._entries = 0
        self._version: int | None = None
        self._keys: list[str] = []
        self._numbers: dict[str, int] = {}
        self._alive = np.empty(0, np.bool_)  # (N,)
        self._hashes = np.empty(0, np.int64)  # (N,) of their ids
        self._parts: list[sparse.csr_array] = []

    def add(self, keys: Sequence[str], encoded: Encoded) -> None:
        """Write the weights of passages."""
        if encoded.lexical is not None:
            self._append({"batch": Batch.of(keys, encoded.lexical).pack()})

    def remove(self, keys: Sequence[str]) -> None:
        """Write that passages were deleted or replaced."""
        known = self.present(keys)
        if known:
            self._append({"deleted": json.dumps(sorted(known))})

    def _append(self, entry: Mapping[str, str]) -> None:
        self._upsert([uuid.uuid4().hex], [entry])

    def sync(self) -> None:
        """Read the entries that were added since the last time, by this process or another."""
        with self._lock:
            version = self.connection.version()
            if version is not None and version == self._version:
                return
            try:
                self._read_new()
            except NotFoundError:  # another process has compacted the collection
                self.forget()
                self._read_new()
            self._version = version

    def _read_new(self) -> None:
        collection = self.collection()
        if collection is not None and collection.id != self._log:  # a new one, or compacted
            self.forget()
            collection = self.collection()
            self._log = collection and collection.id
        while collection is not None:
            found = collection.get(offset=self._entries, limit=_PAGE, include=["metadatas"])
            if not found["ids"]:
                return
            self._read(found["metadatas"] or [])
            self._entries += len(found["ids"])

    def _read(self, entries: Sequence[Any]) -> None:
        batches: list[Batch] = []
        for entry in entries:
            if "deleted" in entry:
                self._index(batches)
                batches = []
                for key in json.loads(entry["deleted"]):
                    self._bury(key)
            else:
                batches.append(Batch.unpack(entry["batch"]))
        self._index(batches)

    def _index(self, batches: Sequence[Batch]) -> None:
        if not batches:
            return
        parts = [*self._parts, postings(batches)]
        # Few parts make a search fast, and parts of growing size make growing cheap.
        while len(parts) > 1 and parts[-2].nnz <= 2 * parts[-1].nnz:
            parts[-2:] = [merged(parts[-2:])]
        keys = [key for batch in batches for key in batch.keys]
        self._alive = np.concatenate([self._alive, np.ones(len(keys), np.bool_)])
        hashes = np.fromiter((hash(passage_of(key)) for key in keys), np.int64, len(keys))
        self._hashes = np.concatenate([self._hashes, hashes])
        for key in keys:
            self._bury(key)
            self._numbers[key] = len(self._keys)
            self._keys.append(key)
        self._parts = parts

    def _bury(self, key: str) -> None:
        number = self._numbers.pop(key, None)
        if number is not None:
            self._alive[number] = False

    def __len__(self) -> int:
        return len(self._numbers)

    def present(self, keys: Sequence[str]) -> set[str]:
        """Those of the passages that have weights."""
        self.sync()
        return {key for key in keys if key in self._numbers}

    def scores(self, query: Mapping[int, float]) -> LexicalScores:
        """Lexical scores of all passages; 0 for those that were deleted.

        Args:
            query: Token id to weight.
        """
        with self._lock:
            parts, alive = self._parts, self._alive
            tables = (self._hashes, self._keys, self._numbers)
        tokens = np.array(list(query), np.int64)  # (Q,)
        weights = np.array(list(query.values()), np.float32)  # (Q,)
        found = [np.empty(0, np.float32), *(part_scores(part, tokens, weights) for part in parts)]
        return LexicalScores(np.concatenate(found) * alive, *tables)

    def write_compact(self, target: Collection, keys: Sequence[str]) -> None:
        """Write the weights of passages that are stored, in large entries."""
        self.sync()
        if not self._parts:
            return
        weights = merged(self._parts).tocsc()
        numbers = sorted(self._numbers[key] for key in keys if key in self._numbers)
        for start in range(0, len(numbers), _ENTRY):
            chosen = numbers[start : start + _ENTRY]
            columns = weights[:, chosen]
            batch = Batch(
                [self._keys[number] for number in chosen],
                np.diff(columns.indptr).astype(np.uint32),
                columns.indices.astype(np.uint32),
                columns.data,
            )
            entry: Any = {"batch": batch.pack()}
            target.upsert(ids=[uuid.uuid4().hex], embeddings=no_vectors(1), metadatas=[entry])
