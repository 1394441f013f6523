"""Lexical weights beside a Chroma collection, and the inverted index over them.

Weights are kept in a second collection of the same database, one entry a batch of passages, so that
they work wherever Chroma does and never show up in anybody's metadata. Entries are only ever added.
Each process that searches keeps the postings in memory, and reads the entries that it has not seen
before each search. Knows no model, and does not trust its own entries: `scores_of` gives 0 for a
passage whose text has changed since, and passages that were deleted are never found in the
collection itself.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from chromadb.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chromadb import Collection
    from chromadb.api import ClientAPI
    from langchain_chroma import Chroma
    from numpy.typing import NDArray

_PAGE = 50  # entries read at once
_POSTINGS = 4_000_000  # looked at per search, the query's heaviest tokens first


class Batch(NamedTuple):
    """Passages of one entry, `N` of them with `M` weights in all."""

    ids: list[str]
    texts: NDArray[np.uint64]  # (N,) hashes
    lengths: NDArray[np.uint32]  # (N,) weights per passage
    tokens: NDArray[np.uint32]  # (M,)
    weights: NDArray[np.float32]  # (M,)


def text_hash(text: str) -> int:
    """Sixty-four bits that tell whether a passage still is what its weights were computed of."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def open_log(client: ClientAPI, collection: Collection, *, create: bool) -> Collection | None:
    """The collection that holds another one's lexical weights.

    Its name holds the other's id, not its name: a collection made anew starts without weights.

    Returns:
        The collection; None where there is none and none should be made.
    """
    name = f"{collection.id}.lexical"
    if create:
        metadata = {"lexical weights of": collection.name}
        return client.get_or_create_collection(name, embedding_function=None, metadata=metadata)
    try:
        return client.get_collection(name, embedding_function=None)
    except NotFoundError:
        return None


def append(
    log: Collection,
    ids: Sequence[str],
    texts: Sequence[str],
    weights: Sequence[Mapping[int, float]],
) -> None:
    """Write one batch; the same passages again take the place of the first entry."""
    batch = Batch(
        list(ids),
        np.array([text_hash(text) for text in texts], np.uint64),
        np.array([len(passage) for passage in weights], np.uint32),
        np.array([token for passage in weights for token in passage], np.uint32),
        np.array([value for passage in weights for value in passage.values()], np.float32),
    )
    key = hashlib.sha256(json.dumps(batch.ids).encode()).hexdigest()
    no_vector = np.ones((1, 1), np.float32)
    log.upsert(ids=[key], embeddings=no_vector, metadatas=[{"batch": _packed(batch)}])


def _packed(batch: Batch) -> str:
    stream = io.BytesIO()
    names = np.frombuffer(json.dumps(batch.ids).encode(), np.uint8)
    np.savez_compressed(stream, names, *batch[1:])
    return base64.b64encode(stream.getvalue()).decode()


def _unpacked(packed: str) -> Batch:
    with np.load(io.BytesIO(base64.b64decode(packed)), allow_pickle=False) as arrays:
        names, *rest = (arrays[f"arr_{place}"] for place in range(len(Batch._fields)))
    return Batch(json.loads(names.tobytes()), *rest)


class Postings(NamedTuple):
    """Weights of passages in order of token: those of `tokens[i]` from `starts[i]` on."""

    tokens: NDArray[np.uint32]  # (V,)
    starts: NDArray[np.int64]  # (V + 1,)
    passages: NDArray[np.uint32]  # (M,)
    weights: NDArray[np.float32]  # (M,)

    def of(self, tokens: NDArray[np.uint32]) -> Iterator[tuple[int, slice]]:
        """Where the postings of each known token are, by the token's place in `tokens`."""
        if not len(self.tokens):
            return
        places = np.searchsorted(self.tokens, tokens).clip(max=len(self.tokens) - 1)
        for i in np.flatnonzero(self.tokens[places] == tokens).tolist():
            yield i, slice(self.starts[places[i]], self.starts[places[i] + 1])


def postings(
    tokens: NDArray[np.uint32], passages: NDArray[np.uint32], weights: NDArray[np.float32]
) -> Postings:
    """Sort weights by token; all arrays are `(M,)`."""
    order = np.argsort(tokens, kind="stable")  # (M,)
    distinct, starts = np.unique(tokens[order], return_index=True)  # (V,)
    return Postings(distinct, np.append(starts, len(tokens)), passages[order], weights[order])


def merged(first: Postings, second: Postings) -> Postings:
    """Two in one."""
    tokens = [np.repeat(part.tokens, np.diff(part.starts)) for part in (first, second)]
    return postings(
        np.concatenate(tokens),
        np.concatenate([first.passages, second.passages]),
        np.concatenate([first.weights, second.weights]),
    )


class LexicalIndex:
    """The entries of a log, searchable; safe to use from several threads.

    Args:
        log: What `open_log` gave.
    """

    def __init__(self, log: Collection) -> None:
        self.log = log
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._ids: list[str] = []
        self._texts: list[int] = []
        self._latest: dict[str, int] = {}
        self._parts: list[Postings] = []

    def sync(self) -> None:
        """Read the entries that were added since the last time, by whomever."""
        with self._lock:
            new = [key for key in self.log.get(include=[])["ids"] if key not in self._seen]
            for start in range(0, len(new), _PAGE):
                found = self.log.get(ids=new[start : start + _PAGE], include=["metadatas"])
                self._add([_unpacked(str(entry["batch"])) for entry in found["metadatas"] or []])
                self._seen.update(found["ids"])

    def add(
        self, ids: Sequence[str], texts: Sequence[str], weights: Sequence[Mapping[int, float]]
    ) -> None:
        """Write a batch of passages to the log."""
        append(self.log, ids, texts, weights)

    def __contains__(self, passage: str) -> bool:
        return passage in self._latest

    def _add(self, batches: Sequence[Batch]) -> None:
        first = len(self._ids)
        for batch in batches:
            self._ids += batch.ids
            self._texts += batch.texts.tolist()
        self._latest.update(zip(self._ids[first:], range(first, len(self._ids)), strict=True))
        lengths = np.concatenate([batch.lengths for batch in batches])  # (N,)
        numbers = np.arange(first, len(self._ids), dtype=np.uint32)  # (N,)
        part = postings(
            np.concatenate([batch.tokens for batch in batches]),
            np.repeat(numbers, lengths),
            np.concatenate([batch.weights for batch in batches]),
        )
        parts = [*self._parts, part]
        # Few parts make a search fast, and parts of growing size make growing cheap.
        while len(parts) > 1 and len(parts[-2].weights) <= 2 * len(parts[-1].weights):
            parts[-2:] = [merged(*parts[-2:])]
        self._parts = parts

    def scores(self, query: Mapping[int, float]) -> NDArray[np.float32]:
        """Lexical scores of all passages by number, `(N,)`.

        Args:
            query: Token id to weight. Its heaviest tokens count first where postings are too many.
        """
        with self._lock:
            parts, count = self._parts, len(self._ids)
        tokens = np.array(sorted(query, key=lambda token: -query[token]), np.uint32)
        scores = np.zeros(count, np.float32)  # (N,)
        for part in parts:
            left = _POSTINGS
            for place, run in part.of(tokens):
                left -= run.stop - run.start
                if left < 0:
                    break
                scores[part.passages[run]] += query[int(tokens[place])] * part.weights[run]
        return scores

    def ranked(self, scores: NDArray[np.float32], count: int) -> list[str]:
        """Ids of the passages with the highest scores above 0, the best first."""
        count = min(count, len(scores))
        best = np.argpartition(scores, len(scores) - count)[len(scores) - count :]  # (count,)
        best = best[np.argsort(-scores[best], kind="stable")]
        numbers = best[scores[best] > 0].tolist()
        return [self._ids[n] for n in numbers if self._latest[self._ids[n]] == n]

    def scores_of(
        self, scores: NDArray[np.float32], ids: Sequence[str], texts: Sequence[str]
    ) -> NDArray[np.float32]:
        """Scores of passages as they are stored now, `(len(ids),)`.

        Args:
            scores: What `scores` gave.
            ids: Passages of the collection.
            texts: Their texts there; one that was changed since scores 0.
        """
        numbers = [self._latest.get(passage, len(scores)) for passage in ids]
        return np.array(
            [
                scores[n] if n < len(scores) and self._texts[n] == text_hash(text) else 0
                for n, text in zip(numbers, texts, strict=True)
            ],
            np.float32,
        )


_indexes: WeakKeyDictionary[Chroma, tuple[object, LexicalIndex]] = WeakKeyDictionary()


def index_of(store: Chroma, *, create: bool) -> LexicalIndex | None:
    """The index of a store's collection, kept as long as the store; None: it has no weights."""
    collection = store._collection  # noqa: SLF001
    made_of, index = _indexes.get(store, (None, None))
    if index is not None and made_of == collection.id:
        return index
    log = open_log(store._client, collection, create=create)  # noqa: SLF001
    if log is None:
        return None
    index = LexicalIndex(log)
    _indexes[store] = (collection.id, index)
    return index
