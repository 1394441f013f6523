"""The inverted index of lexical weights, in the memory of each process that searches."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from langchain_bge_dense.chroma.signals import Position, passage_of, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.signals import Signals

_VOCABULARY = 1 << 18  # rows of a part, more where a token id asks for it


def postings(packed: Sequence[bytes]) -> sparse.csr_array:
    """Invert packed weights into a matrix of tokens by passages."""
    sizes, tokens, weights = unpack(packed)  # (N,), (M,), (M,)
    passages = np.repeat(np.arange(len(sizes)), sizes)  # (M,)
    rows = max(_VOCABULARY, int(tokens.max(initial=0)) + 1)
    return sparse.csr_array((weights, (tokens, passages)), shape=(rows, len(sizes)))


def merged(parts: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Concatenate the passages of parts, in their order."""
    rows = max(part.shape[0] for part in parts)
    for part in parts:
        part.resize((rows, part.shape[1]))
    return sparse.hstack(parts, format="csr")


def part_scores(
    part: sparse.csr_array, tokens: NDArray[np.int64], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compute the scores of a part's passages, `(N,)`, by `(Q,)` tokens and weights of a query."""
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
        """Rank the ids of the passages with scores above 0, of some or all, the best first."""
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
        """Look up scores of passages, `(len(keys),)`. One without weights of its text has NaN."""
        scores = np.full(len(keys), np.nan, np.float32)
        for row, key in enumerate(keys):
            number = self.numbers.get(key)
            if number is not None and number < len(self.values):
                scores[row] = self.values[number]
        return scores


class LexicalIndex:
    """The index over a table of signals; safe to use from several threads."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._position = Position()
        self._keys: list[str] = []
        self._numbers: dict[str, int] = {}
        self._alive = np.empty(0, np.bool_)  # (N,)
        self._hashes = np.empty(0, np.int64)  # (N,) of their ids
        self._parts: list[sparse.csr_array] = []

    def sync(self) -> None:
        """Read what was written since the last time, by this process or another."""
        with self._lock:
            for position, rows in self._signals.since(self._position):
                if position.log != self._position.log:
                    self._forget()
                self._read(rows)
                self._position = position

    def _read(self, rows: Sequence[tuple[str, bytes | None]]) -> None:
        for key, _ in rows:
            number = self._numbers.pop(key, None)
            if number is not None:
                self._alive[number] = False
        written = [(key, packed) for key, packed in rows if packed is not None]
        if not written:
            return
        keys = [key for key, _ in written]
        parts = [*self._parts, postings([packed for _, packed in written])]
        # Few parts make a search fast, and parts of growing size make growing cheap.
        while len(parts) > 1 and parts[-2].nnz <= 2 * parts[-1].nnz:
            parts[-2:] = [merged(parts[-2:])]
        self._alive = np.concatenate([self._alive, np.ones(len(keys), np.bool_)])
        hashes = np.fromiter((hash(passage_of(key)) for key in keys), np.int64, len(keys))
        self._hashes = np.concatenate([self._hashes, hashes])
        self._numbers.update(
            zip(keys, range(len(self._keys), len(self._keys) + len(keys)), strict=True)
        )
        self._keys += keys
        self._parts = parts

    def __len__(self) -> int:
        return len(self._numbers)

    def scores(self, query: Mapping[int, float]) -> LexicalScores:
        """Compute the scores of all passages by token id and weight. Deleted ones have 0."""
        with self._lock:
            parts, alive = self._parts, self._alive
            tables = (self._hashes, self._keys, self._numbers)
        tokens = np.array(list(query), np.int64)  # (Q,)
        weights = np.array(list(query.values()), np.float32)  # (Q,)
        found = [np.empty(0, np.float32), *(part_scores(part, tokens, weights) for part in parts)]
        return LexicalScores(np.concatenate(found) * alive, *tables)
