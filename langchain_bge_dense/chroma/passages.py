"""The passages of a collection, and all that belongs to them, read and written together."""

from __future__ import annotations

import base64
import contextlib
import uuid
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._codes import Codec, check_kind, colbert_windows
from langchain_bge_dense.chroma.colbert import ColbertCodes
from langchain_bge_dense.chroma.collection import (
    COLBERT,
    COLBERT_MEAN,
    COLBERT_POOLING,
    LEXICAL,
    UID,
    add_metadata,
    underlying,
)
from langchain_bge_dense.chroma.companions import Companion, Encoded, Truncations, key_of
from langchain_bge_dense.chroma.connection import COPY, retried
from langchain_bge_dense.chroma.lexical import LexicalWeights
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chromadb.api.models.Collection import Collection
    from langchain_core.embeddings import Embeddings
    from numpy.typing import NDArray

    from langchain_bge_dense._codes import Kind
    from langchain_bge_dense.chroma.connection import Connection
    from langchain_bge_dense.chroma.records import Record

_PAGE = 256  # passages completed at once

Stored = dict[str, tuple[str, "Mapping[str, Any]"]]
"""Id to text and metadata."""


class Kept(NamedTuple):
    """What belongs to each passage of a collection; None: as the collection has it.

    Attributes:
        lexical: Lexical weights.
        colbert: Kind of its ColBERT codes; False: it has none.
        pooling: Tokens that share a ColBERT vector.
    """

    lexical: bool | None = None
    colbert: Kind | Literal[False] | None = None
    pooling: int = 1

    @classmethod
    def of(cls, lexical: bool | None, colbert: Kind | bool | None, pooling: int) -> Kept:
        """What a caller asked for.

        Raises:
            ValueError: There are no such codes.
        """
        kind: Any = "1bit" if colbert is True else colbert
        check_kind("1bit" if kind is None or kind is False else kind, pooling)
        return cls(lexical, kind, pooling)

    def check(self, embeddings: Embeddings) -> None:
        """Refuse embeddings that do not give what is asked for.

        Raises:
            TypeError: They do not.
        """
        options = {"lexical=True": self.lexical, f"colbert={self.colbert!r}": self.colbert}
        wanted = [option for option, value in options.items() if value]
        if wanted and not isinstance(underlying(embeddings), BGEM3Embeddings):
            msg = (
                f"{' and '.join(wanted)} was asked for, and {type(embeddings).__name__} gives "
                "dense vectors alone. Open the store with BGEM3Embeddings, or leave it out."
            )
            raise TypeError(msg)

    def metadata(self) -> dict[str, Any]:
        """As a new collection says it."""
        codes = {COLBERT: self.colbert, COLBERT_POOLING: self.pooling} if self.colbert else {}
        return {UID: uuid.uuid4().hex, LEXICAL: bool(self.lexical), **codes}

    def refused_by(self, found: Kept) -> str:
        """What of this a collection cannot follow; empty: it can."""
        if self.lexical is False and found.lexical:
            return "lexical=False"
        same = self[1:] == found[1:]
        if self.colbert is not None and found.colbert and not same:
            return f"colbert={self.colbert!r} with colbert_pooling={self.pooling}"
        return ""

    def described(self) -> str:
        """What a collection has, in words."""
        codes = f"{self.colbert!r} ColBERT codes with colbert_pooling={self.pooling}"
        return " and ".join(["lexical weights"] * bool(self.lexical) + [codes] * bool(self.colbert))


class Readable:
    """The collection of passages, read again where another process has written meanwhile."""

    def __init__(self, passages: Passages) -> None:
        self._passages = passages

    def __getattr__(self, name: str) -> Any:
        passages = self._passages
        if name not in {"get", "query"}:
            return getattr(passages.collection, name)

        def read(*args: Any, **options: Any) -> Any:
            call = methodcaller(name, *args, **options)
            return passages.connection.read(lambda: call(passages.collection))

        return read


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
            add_metadata(self._collection, **Kept().metadata())
            metadata = self._collection.metadata
        self.uid = str(metadata[UID])
        self.truncations = Truncations(self.connection, self.uid)
        self.weights = LexicalWeights(self.connection, self.uid)
        self.codes = ColbertCodes.of(self.connection, self.uid)
        self.companions: list[Companion] = [self.truncations, self.weights, self.codes]

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
    def metadata(self) -> Mapping[str, Any]:
        """What the collection says of its passages."""
        return self._collection.metadata or {}

    @property
    def lexical(self) -> bool:
        """Whether passages have lexical weights."""
        return bool(self.metadata.get(LEXICAL))

    @property
    def colbert(self) -> Kind | None:
        """Kind of the ColBERT codes that passages have; None: they have none."""
        return self.metadata.get(COLBERT) or None

    @property
    def kept(self) -> list[LexicalWeights | ColbertCodes]:
        """What belongs to each passage of this collection."""
        return [*[self.weights] * self.lexical, *[self.codes] * bool(self.colbert)]

    def kept_metadata(self) -> dict[str, Any]:
        """What a new collection says that keeps what this one keeps."""
        settings = (LEXICAL, COLBERT, COLBERT_POOLING, COLBERT_MEAN)
        kept = {key: self.metadata[key] for key in settings if key in self.metadata}
        return {**Kept().metadata(), **kept}

    def keep(self, wanted: Kept) -> None:
        """Follow what was asked for of the passages that are written from now on.

        Raises:
            TypeError: The embeddings give no such output.
            ValueError: The collection keeps something else.
        """
        found = Kept(self.lexical, self.colbert or False, self.metadata.get(COLBERT_POOLING, 1))
        refused = wanted.refused_by(found)
        if refused:
            msg = (
                f"{refused} was asked for, and collection {self._collection.name!r} has "
                f"{found.described()}. Leave it out, or take another collection_name."
            )
            raise ValueError(msg)
        wanted.check(self.embeddings)
        self._set(**{LEXICAL: wanted.lexical or found.lexical})
        if wanted.colbert:
            self._set(**{COLBERT: wanted.colbert, COLBERT_POOLING: wanted.pooling})

    def _set(self, **metadata: Any) -> None:
        if metadata.items() - self.metadata.items():
            self.connection.acquire_writer()
            add_metadata(self.collection, **metadata)

    def codec(self, *, create: bool = False) -> Codec | None:
        """How ColBERT vectors are kept; None: they are not, or none was kept so far.

        Args:
            create: Decide it now, if it was not yet; for the process that writes.
        """
        if self.colbert is None:
            return None
        pooling = int(self.metadata[COLBERT_POOLING])
        if COLBERT_MEAN not in self.metadata:
            if not create:
                return None
            model: Any = underlying(self.embeddings)
            mean = Codec.of(model, self.colbert).mean.astype(np.float16)
            self._set(**{COLBERT_MEAN: base64.b64encode(mean.tobytes()).decode()})
        stored = base64.b64decode(str(self.metadata[COLBERT_MEAN]))
        return Codec(self.colbert, pooling, np.frombuffer(stored, np.float16).astype(np.float32))

    def stored(self, ids: Sequence[str]) -> Stored:
        """Texts and metadata of those passages that are stored."""
        if not ids:
            return {}
        found: Any = self._get(ids=list(ids), include=["documents", "metadatas"])
        texts = (text or "" for text in found["documents"])
        metadatas = (metadata or {} for metadata in found["metadatas"])
        return dict(zip(found["ids"], zip(texts, metadatas, strict=True), strict=True))

    def keys(self, ids: Sequence[str]) -> list[str]:
        """Keys of those passages that are stored."""
        return [key_of(passage, text) for passage, (text, _) in self.stored(ids).items()]

    def _get(self, **options: Any) -> Any:
        return retried(lambda: self.connection.read(lambda: self.collection.get(**options)))

    def complete(
        self,
        records: Sequence[Record],
        stored: Stored,
        kept: Sequence[LexicalWeights | ColbertCodes],
    ) -> set[str]:
        """Ids of the records that are stored as they are, with all that belongs to them.

        Args:
            records: To be stored.
            stored: What is stored under their ids.
            kept: What would be stored with them.
        """
        equal = {r.key: r for r in records if r.id in stored and r.equals(*stored[r.id])}
        for companion in kept:
            equal = {key: equal[key] for key in companion.present(list(equal))}
        lengths = self.truncations.lengths(list(equal))
        room = getattr(underlying(self.embeddings), "max_length", None)
        return {
            r.id
            for key, r in equal.items()
            if not lengths.get(key) or (room is not None and room <= lengths[key])
        }

    def encode(self, texts: Sequence[str], *, dense: bool = True) -> Encoded:
        """Vectors of new passages, with the weights and codes that the collection keeps.

        Args:
            texts: N passages.
            dense: Compute dense vectors; without, there are N of no width.
        """
        model = underlying(self.embeddings)
        codec = self.codec(create=True)
        kept = self.lexical or codec is not None
        if isinstance(model, BGEM3Embeddings) and (kept or model is self.embeddings):
            parts = colbert_windows(texts) if codec else [texts]
            return Encoded.joined([self._encoded(model, part, codec, dense) for part in parts])
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as non-finite
            vectors = np.asarray(self.embeddings.embed_documents(list(texts)), np.float32)  # (N, D)
        if len(vectors) != len(texts):
            msg = (
                f"{type(self.embeddings).__name__}.embed_documents gave {len(vectors)} vectors for "
                f"{len(texts)} texts. Use embeddings that give one for each."
            )
            raise ValueError(msg)
        return Encoded(vectors)

    def _encoded(
        self,
        model: BGEM3Embeddings,
        texts: Sequence[str],
        codec: Codec | None,
        dense: bool,
    ) -> Encoded:
        encoding = model.encode(texts, dense=dense, lexical=self.lexical, colbert=bool(codec))
        length = model.max_length or 0
        return Encoded(
            np.empty((len(texts), 0), np.float32) if encoding.dense is None else encoding.dense,
            encoding.lexical,
            [length if truncated else None for truncated in encoding.truncated.tolist()],
            int(encoding.token_counts.sum()),
            [codec.compress(vectors) for vectors in encoding.colbert or ()] if codec else None,
        )

    def write(self, records: Sequence[Record], encoded: Encoded, stored: Stored) -> None:
        """Store passages in the place of those with their ids.

        Args:
            records: Of different ids.
            encoded: What the model makes of them.
            stored: What is stored under their ids.
        """
        _check_finite(records, encoded.vectors)
        keys = [r.key for r in records]
        former = {key_of(r.id, stored[r.id][0]) for r in records if r.id in stored}
        cuts = zip(keys, encoded.truncated_at or [None] * len(keys), strict=True)
        columns = {
            "ids": [r.id for r in records],
            "documents": [r.text for r in records],
            "metadatas": [_replacing(r, stored) for r in records],
            "embeddings": encoded.vectors,
        }
        with self.connection.writing:
            for companion in self.companions:
                companion.add(keys, encoded)
            self._write(len(keys), methodcaller("upsert", **columns))
            self._remove(sorted(former.difference(keys)))
            self.truncations.remove([key for key, cut in cuts if cut is None])

    def _write(self, count: int, call: Callable[[Collection], object]) -> None:
        self.connection.write(lambda: self.collection, count, call)

    def _remove(self, keys: Sequence[str]) -> None:
        if keys:
            for companion in self.companions:
                companion.remove(keys)

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
            keys = self.keys(batch)
            with self.connection.writing:
                self._write(len(batch), methodcaller("delete", ids=batch))
                self._remove(keys)

    def drop(self) -> None:
        """Delete the collection and all that belongs to it."""
        name = self.collection.name
        with self.connection.writing, self.connection.exclusive():
            for companion in self.companions:
                companion.drop()
            for deleted in (name, f"{name}{COPY}"):
                with contextlib.suppress(NotFoundError):
                    self.connection.client.delete_collection(deleted)

    def restart(self, collection: Collection) -> None:
        """Begin anew with an empty collection."""
        self._collection = collection
        self._name_uid()

    def add_missing(self) -> int:
        """Compute weights and codes of passages without; gives how many there were."""
        self.connection.acquire_writer()
        added = 0
        for batch in batch_iterate(_PAGE, self._get(include=[])["ids"]):
            texts = {key_of(p, text): text for p, (text, _) in self.stored(batch).items()}
            present = [kept.present(list(texts)) for kept in self.kept]
            lacking = [key for key in texts if not all(key in found for found in present)]
            if lacking:
                encoded = self.encode([texts[key] for key in lacking], dense=False)
                with self.connection.writing:
                    for companion, found in zip(self.kept, present, strict=True):
                        if not found.issuperset(lacking):
                            companion.add(lacking, encoded)
            added += len(lacking)
        return added


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
