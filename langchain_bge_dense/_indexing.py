"""One run of `index_documents` or `index_vectors`, chunk by chunk: what is new is stored.

Knows no progress bars and no event loops.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import httpx
import numpy as np
from chromadb.errors import InternalError, RateLimitError
from langchain_chroma import Chroma

from langchain_bge_dense._collection import DIMENSION, check, fingerprint_of
from langchain_bge_dense._folder import guarded, no_room, write_alone
from langchain_bge_dense._lexical import index_of
from langchain_bge_dense._records import Record, record
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chromadb import Collection
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WAITS = (
    1.0,
    2.0,
    4.0,
    8.0,
    15.0,
    30.0,
)  # seconds before a server that does not answer is asked again


@dataclass(frozen=True)
class IndexResult:
    """What `index_documents` or `index_vectors` did.

    Attributes:
        added: Documents that were stored.
        skipped: Documents that the collection, or the same input further up, had already.
        truncated: Documents among the added ones that were longer than the model takes.
        tokens: Of the added documents, before any cut; 0 if not `BGEM3Embeddings` embedded them.

    Example:
        >>> IndexResult(added=2, skipped=1, truncated=0).added
        2
    """

    added: int
    skipped: int
    truncated: int
    tokens: int = 0


class Run:
    """One call: where it writes, and its counts so far.

    Chunks are cut by position in the input, and each is one write: a run after a kill embeds the
    same texts together, and gets the same vectors to the last bit.
    """

    def __init__(
        self,
        store: Chroma,
        batch_size: int,
        *,
        lexical: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        _check(store, batch_size, lexical=lexical)
        client = store._client  # noqa: SLF001 - Chroma has no public way to upsert vectors
        self._collection = collection = store._collection  # noqa: SLF001
        self._embeddings: Embeddings = store.embeddings  # type: ignore[assignment]
        fresh = _patiently(lambda: client.get_collection(collection.name, embedding_function=None))
        check(fresh, fingerprint or fingerprint_of(self._embeddings))
        settings = client.get_settings()
        local = settings.is_persistent
        self._folder = write_alone(settings.persist_directory) if local else None
        self.batch_size = min(batch_size, _patiently(client.get_max_batch_size))
        self._index = self._ask(0, lambda: index_of(store, create=True)) if lexical else None
        if self._index is not None:
            self._ask(0, self._index.sync, self._index.log)
        self._dimension: int | None = fresh.metadata.get(DIMENSION)
        self._added = self._seen = self._truncated = self._tokens = 0

    def add(self, chunk: Sequence[Document], vectors: Sequence[ArrayLike] | None = None) -> None:
        """Store those of the next documents that the collection lacks.

        Args:
            chunk: The documents.
            vectors: Theirs; None: they are embedded here.
        """
        records = {r.id: r for r in map(record, chunk, itertools.count(self._seen))}
        ids = list(records)
        known = self._ask(0, lambda: set(self._collection.get(ids=ids, include=[])["ids"]))
        if self._index is not None:
            known = {passage for passage in known if passage in self._index}
        new = [r for r in records.values() if r.id not in known]
        if new and vectors is None:
            self._store(new, _encoded(self._embeddings, new, lexical=self._index is not None))
        elif new and vectors is not None:
            rows = [self._checked(vectors[r.position - self._seen], r.position) for r in new]
            self._store(new, _Encoded(np.stack(rows)))
        self._seen += len(chunk)
        self._added += len(new)

    def _checked(self, vector: ArrayLike, position: int) -> NDArray[np.float32]:
        """A vector of the caller's, `(D,)`."""
        with np.errstate(over="ignore"):
            row = np.asarray(vector, dtype=np.float32)
        if row.ndim != 1 or row.size != (self._dimension or row.size):
            msg = (
                f"The vector of document {position} has the shape {row.shape}, and the collection "
                f"takes {self._dimension} numbers. Pass vectors of the collection's own model."
            )
            raise ValueError(msg)
        return row

    def _store(self, records: Sequence[Record], encoded: _Encoded) -> None:
        """Write; weights come first, as they do no harm without their passages."""
        columns = _columns(records, encoded.vectors)
        index, weights = self._index, encoded.weights
        if index is not None and weights is not None:
            ids, texts = columns["ids"], columns["documents"]
            self._ask(1, lambda: index.add(ids, texts, weights), index.log)
        self._ask(len(records), lambda: self._collection.upsert(**columns))
        self._truncated += encoded.truncated
        self._tokens += encoded.tokens

    def _ask(self, coming: int, call: Callable[[], T], collection: Collection | None = None) -> T:
        """Call Chroma, which is on a server, in memory, or in a folder that is to be guarded."""
        if self._folder is None:
            return _patiently(call)
        try:
            with guarded(self._folder, collection or self._collection, coming):
                return call()
        except InternalError as error:
            raise no_room(self._folder, error) from error

    @property
    def done(self) -> IndexResult:
        """The counts so far."""
        skipped = self._seen - self._added
        return IndexResult(self._added, skipped, self._truncated, self._tokens)


class _Encoded(NamedTuple):
    """What a model makes of `N` records."""

    vectors: NDArray[np.float32]  # (N, D)
    truncated: int = 0
    tokens: int = 0
    weights: list[dict[int, float]] | None = None


def _encoded(embeddings: Embeddings, records: Sequence[Record], *, lexical: bool) -> _Encoded:
    texts = [r.text for r in records]
    if isinstance(embeddings, BGEM3Embeddings):
        encoding = embeddings.encode(texts, lexical=lexical)
        truncated = int(encoding.truncated.sum())
        tokens = int(encoding.token_counts.sum())
        return _Encoded(encoding.dense, truncated, tokens, encoding.lexical)  # type: ignore[arg-type]
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as not finite
        vectors = np.asarray(embeddings.embed_documents(texts), dtype=np.float32)  # (N, D)
    if len(vectors) != len(records):
        msg = (
            f"{type(embeddings).__name__}.embed_documents gave {len(vectors)} vectors for "
            f"{len(records)} texts. Use embeddings that give one for each."
        )
        raise ValueError(msg)
    return _Encoded(vectors)


def _columns(records: Sequence[Record], vectors: NDArray[np.float32]) -> dict[str, Any]:
    """All that Chroma stores of new documents."""
    finite = np.isfinite(vectors).all(axis=1)  # (N,)
    if not finite.all():
        msg = (
            f"The vector of document {records[int(finite.argmin())].position} is not finite. "
            "Leave the document out, or use embeddings that can take it."
        )
        raise FloatingPointError(msg)
    return {
        "ids": [r.id for r in records],
        "documents": [r.text for r in records],
        "metadatas": [r.metadata or None for r in records],
        "embeddings": list(vectors),
    }


def _patiently(call: Callable[[], T]) -> T:
    """Call Chroma, and again after a while where its server does not answer."""
    waits = iter(_WAITS)
    while True:
        try:
            return call()
        except (httpx.TransportError, RateLimitError) as error:  # noqa: PERF203
            wait = next(waits, None)
            if wait is None:
                msg = (
                    f"The Chroma server did not answer for {sum(_WAITS):.0f} seconds: {error}. "
                    "Start it and run this again; what is stored is not embedded again."
                )
                raise ConnectionError(msg) from error
            logger.warning("Chroma did not answer (%s); next try in %s s.", error, wait)
            time.sleep(wait)


def _check(store: object, batch_size: int, *, lexical: bool) -> None:
    if not isinstance(store, Chroma):
        msg = f"The store is {type(store).__name__}, not Chroma. Make it with open_chroma."
        raise TypeError(msg)
    if store.embeddings is None:
        msg = "The store has no embeddings. Make it with open_chroma."
        raise ValueError(msg)
    if batch_size < 1:
        msg = f"batch_size is {batch_size}. Use 1 or more."
        raise ValueError(msg)
    if lexical and not isinstance(store.embeddings, BGEM3Embeddings):
        msg = (
            f"lexical=True was asked for, and {type(store.embeddings).__name__} gives no lexical "
            "weights. Open the store with BGEM3Embeddings, or leave lexical out."
        )
        raise TypeError(msg)
