"""The passages of a collection, and all that belongs to them, read and written together."""

from __future__ import annotations

import contextlib
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense.chroma.collection import LEXICAL, UID, add_metadata, underlying
from langchain_bge_dense.chroma.companions import Companion, Encoded, Truncations
from langchain_bge_dense.chroma.connection import COPY, retried
from langchain_bge_dense.chroma.lexical import LexicalWeights
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb.api.models.Collection import Collection
    from langchain_core.embeddings import Embeddings
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.connection import Connection
    from langchain_bge_dense.chroma.records import Record

Stored = dict[str, tuple[str, "Mapping[str, Any]"]]
"""Id to text and metadata."""


class Passages:
    """Passages of one collection.

    Args:
        connection: To its Chroma.
        collection: As it was opened.
        embeddings: Embed new ones.
    """

    def __init__(
        self, connection: Connection, collection: Collection, embeddings: Embeddings
    ) -> None:
        self.connection, self.embeddings = connection, embeddings
        self._collection = collection
        self._generation = connection.generation
        self._name_uid()

    def _name_uid(self) -> None:
        metadata = self._collection.metadata or {}
        if UID not in metadata:
            add_metadata(self._collection, **{UID: uuid.uuid4().hex, LEXICAL: False})
            metadata = self._collection.metadata
        self.uid = str(metadata[UID])
        self.truncations = Truncations(self.connection, self.uid)
        self.weights = LexicalWeights(self.connection, self.uid)
        self.companions: list[Companion] = [self.truncations, self.weights]

    @property
    def collection(self) -> Collection:
        """The collection, as it is in Chroma now."""
        self.connection.check()
        self.connection.refresh()
        if self._generation != self.connection.generation:
            with self.connection.exclusive():
                self._generation = self.connection.generation
                self._reopen()
                self.connection.seen()
        return self._collection

    def _reopen(self) -> None:
        name = self._collection.name
        found = self.connection.collection(name)
        if found is None:
            msg = f"Collection {name!r} was deleted by another process. Open it by open_chroma."
            raise ValueError(msg)
        self._collection = found
        if (found.metadata or {}).get(UID) != self.uid:
            self._name_uid()

    @property
    def lexical(self) -> bool:
        """Whether passages have lexical weights."""
        return bool((self._collection.metadata or {}).get(LEXICAL))

    def enable_lexical(self) -> None:
        """Store lexical weights of the passages that are written from now on.

        Raises:
            TypeError: The embeddings give none.
        """
        if not isinstance(underlying(self.embeddings), BGEM3Embeddings):
            msg = (
                f"lexical=True was asked for, and {type(self.embeddings).__name__} gives no "
                "lexical weights. Open the store with BGEM3Embeddings, or leave lexical out."
            )
            raise TypeError(msg)
        if not self.lexical:
            self.connection.acquire_writer()
            add_metadata(self.collection, **{LEXICAL: True})

    def stored(self, ids: Sequence[str]) -> Stored:
        """Texts and metadata of those passages that are stored."""
        if not ids:
            return {}
        found: Any = self._get(ids=list(ids), include=["documents", "metadatas"])
        texts = (text or "" for text in found["documents"])
        metadatas = (metadata or {} for metadata in found["metadatas"])
        return dict(zip(found["ids"], zip(texts, metadatas, strict=True), strict=True))

    def _get(self, **options: Any) -> Any:
        return retried(lambda: self.connection.read(lambda: self.collection.get(**options)))

    def complete(self, records: Sequence[Record], stored: Stored, *, weights: bool) -> set[str]:
        """Ids of the records that are stored as they are, with all that belongs to them.

        Args:
            records: To be stored.
            stored: What is stored under their ids.
            weights: Whether lexical weights would be stored with them.
        """
        equal = [r for r in records if r.id in stored and r.equals(*stored[r.id])]
        if self.lexical and weights:
            self.weights.sync()
            equal = [r for r in equal if self.weights.has(r.id, r.text)]
        lengths = self.truncations.lengths([r.id for r in equal])
        room = getattr(underlying(self.embeddings), "max_length", None)
        return {
            r.id
            for r in equal
            if not lengths.get(r.id) or (room is not None and room <= lengths[r.id])
        }

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Vectors of new passages, and their lexical weights where the collection has them."""
        model = underlying(self.embeddings)
        if isinstance(model, BGEM3Embeddings) and (self.lexical or model is self.embeddings):
            encoding: Any = model.encode(texts, lexical=self.lexical)
            length = model.max_length or 0
            cut = [length if truncated else None for truncated in encoding.truncated.tolist()]
            tokens = int(encoding.token_counts.sum())
            return Encoded(encoding.dense, encoding.lexical, cut, tokens)
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as non-finite
            vectors = np.asarray(self.embeddings.embed_documents(list(texts)), np.float32)  # (N, D)
        if len(vectors) != len(texts):
            msg = (
                f"{type(self.embeddings).__name__}.embed_documents gave {len(vectors)} vectors for "
                f"{len(texts)} texts. Use embeddings that give one for each."
            )
            raise ValueError(msg)
        return Encoded(vectors)

    def write(self, records: Sequence[Record], encoded: Encoded, stored: Stored) -> None:
        """Store passages in the place of those with their ids.

        Args:
            records: Of different ids.
            encoded: What the model makes of them.
            stored: What is stored under their ids.
        """
        _check_finite(records, encoded.vectors)
        ids, texts = [r.id for r in records], [r.text for r in records]
        for companion in self.companions:
            companion.add(ids, texts, encoded)
        columns = {
            "ids": ids,
            "documents": texts,
            "metadatas": [_replacing(r, stored) for r in records],
            "embeddings": encoded.vectors,
        }
        self.connection.write(self.collection, len(ids), lambda c: c.upsert(**columns))

    def batch_size(self) -> int:
        """How many passages Chroma takes at once."""
        return retried(self.connection.client.get_max_batch_size)

    def delete(self, **which: Any) -> None:
        """Delete passages.

        Args:
            which: `ids`, `where` or `where_document`, as in Chroma.
        """
        ids = self._get(**which, include=[])["ids"]
        for batch in batch_iterate(self.batch_size(), ids):
            self.connection.write(self.collection, len(batch), partial(_delete, ids=batch))
            for companion in self.companions:
                companion.remove(batch)

    def drop(self) -> None:
        """Delete the collection and all that belongs to it."""
        name = self.collection.name
        with self.connection.exclusive():
            for companion in self.companions:
                companion.drop()
            for deleted in (name, f"{name}{COPY}"):
                with contextlib.suppress(NotFoundError):
                    self.connection.client.delete_collection(deleted)

    def restart(self, collection: Collection) -> None:
        """Begin anew with an empty collection."""
        self._collection = collection
        self._name_uid()

    def add_missing_weights(self) -> int:
        """Compute lexical weights for passages without; gives how many there were."""
        self.connection.acquire_writer()
        self.weights.sync()
        model: Any = underlying(self.embeddings)
        added = 0
        ids = self._get(include=[])["ids"]
        for batch in batch_iterate(256, ids):
            stored = self.stored(batch)
            texts = {
                passage: text
                for passage, (text, _) in stored.items()
                if not self.weights.has(passage, text)
            }
            if texts:
                weights = model.encode(list(texts.values()), dense=False, lexical=True).lexical
                nothing = np.empty((len(texts), 0), np.float32)
                self.weights.add(list(texts), list(texts.values()), Encoded(nothing, weights))
            added += len(texts)
        return added


def _delete(collection: Collection, ids: list[str]) -> None:
    collection.delete(ids=ids)


def _check_finite(records: Sequence[Record], vectors: NDArray[np.float32]) -> None:
    finite = np.isfinite(vectors).all(axis=1)  # (N,)
    if not finite.all():
        msg = (
            f"The vector of document {records[int(finite.argmin())].position} is not finite. "
            "Leave the document out, or use embeddings that can take it."
        )
        raise FloatingPointError(msg)


def _replacing(record: Record, stored: Stored) -> dict[str, Any] | None:
    """Metadata with None for keys that go: Chroma would keep them."""
    _, former = stored.get(record.id, ("", {}))
    gone = dict.fromkeys(former.keys() - record.metadata.keys())
    return {**record.metadata, **gone} or None
