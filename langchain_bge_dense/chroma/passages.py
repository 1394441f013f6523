"""The passages of a collection and their signals, read and written together.

The order of writes, which a kill may end anywhere: signals of the new texts, the passages, then the
signals of former texts go; a passage is deleted before its signals. So a passage that is stored has
its signals, and what is too much does no harm: nothing asks for it, and compaction removes it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._codes import colbert_windows
from langchain_bge_dense._scoring import cosines
from langchain_bge_dense.chroma.collection import GuardedCollection
from langchain_bge_dense.chroma.lexical import LexicalIndex
from langchain_bge_dense.chroma.session import COPY
from langchain_bge_dense.chroma.settings import CollectionSettings, check_model, claim, underlying
from langchain_bge_dense.chroma.signals import Available, Encoded, Signals, key_of, pack, passage_of
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chromadb.api.models.Collection import Collection
    from langchain_core.embeddings import Embeddings
    from numpy.typing import NDArray

    from langchain_bge_dense._codes import Codec
    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.chroma.records import Record
    from langchain_bge_dense.chroma.session import Session
    from langchain_bge_dense.chroma.settings import Wanted

_PAGE = 256  # passages completed at once

Stored = dict[str, tuple[str, "Mapping[str, Any]"]]
"""Id to text and metadata."""


class Passages:
    """Passages of one collection, with its settings, signals and index as the last call found them.

    The embeddings embed new passages; `own` are the settings of a new collection for them.
    """

    settings: CollectionSettings
    signals: Signals
    index: LexicalIndex

    def __init__(
        self, session: Session, name: str, embeddings: Embeddings, own: CollectionSettings
    ) -> None:
        self.session, self.embeddings = session, embeddings
        self._model: Any = underlying(embeddings)
        self.collection = GuardedCollection(session, name, follow=self._follow)
        self._own = own
        self._uid = ""
        self._counted: tuple[int | None, int] = (None, 0)

    def _follow(self, found: Collection) -> None:
        """Take settings, signals and index from the collection that was opened."""
        settings = claim(found, self.embeddings, self._own, self.session.location)
        if settings.uid != self._uid:
            self.signals = Signals.of(self.session, settings.uid)
            self.index = LexicalIndex(self.signals)
            self._uid = settings.uid
        self.settings, self._codec = settings, settings.codec()

    def refresh(self) -> CollectionSettings:
        """Read the settings of the collection as it is now."""
        self.session.read(self.collection.open)
        return self.settings

    def acquire_writer(self) -> None:
        """Make this the process that writes, and follow what others wrote before."""
        self.session.acquire_writer()
        self.refresh()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Write in turns with other threads, to the collection as it is now."""
        with self.session.writing:
            self.refresh()
            yield

    def check_model(self, fingerprint: str) -> None:
        """Check that the vectors are of a model."""
        check_model(self.collection.name, self.refresh(), fingerprint)

    def add_signals(self, wanted: Wanted) -> None:
        """Let passages that are written from now on have the requested signals."""
        wanted.check(self.embeddings)
        self._change(lambda found: wanted.added_to(found, self.collection.name))

    def codec(self) -> Codec | None:
        """Find the codec of the ColBERT vectors, which the first ones decide."""
        if self.settings.colbert and not self.settings.mean:
            self._change(lambda found: found if found.mean else found.with_mean_of(self._model))
        return self._codec

    def _change(self, change: Callable[[CollectionSettings], CollectionSettings]) -> None:
        """Change the settings, as they are in Chroma now."""
        if change(self.settings) != self.settings:
            self.acquire_writer()
            self.collection.forget()
            self.collection.modify(change(self.refresh()).metadata())
            self.refresh()

    def count_without_weights(self) -> tuple[int, int]:
        """Count the passages without lexical weights, and all, after reading new weights.

        Chroma goes through all to count them: where a version tells, once until it changes.
        """
        version = self.session.version()
        if version is None or version != self._counted[0]:
            self._counted = (version, self.collection.count())
        self.index.sync()
        count = self._counted[1]
        if version != self.session.version():  # counted while another process wrote
            return 0, count
        return max(0, count - len(self.index)), count

    def stored(self, ids: Sequence[str]) -> Stored:
        """Look up texts and metadata of the stored passages among these."""
        if not ids:
            return {}
        found = self.collection.get(list(ids), include=["documents", "metadatas"])
        texts = (text or "" for text in found["documents"])
        metadatas = (metadata or {} for metadata in found["metadatas"])
        return dict(zip(found["ids"], zip(texts, metadatas, strict=True), strict=True))

    def ids(self, **which: Any) -> list[str]:
        """Find the ids of the passages that pass Chroma's filters."""
        found: list[str] = self.collection.get(include=[], **which)["ids"]
        return found

    def complete(self, records: Sequence[Record], stored: Stored, *, signals: bool) -> set[str]:
        """Find the records that are stored unchanged, and not cut shorter than needed now.

        With `signals`, they have all signals of the collection, too.
        """
        equal = {r.key: r.id for r in records if r.id in stored and r.equals(*stored[r.id])}
        settings, available = self.settings, self.signals.available(list(equal))
        wanted = (settings.lexical, bool(settings.colbert)) if signals else (False, False)
        room = getattr(self._model, "max_length", None)

        def is_complete(key: str) -> bool:
            cut_at, *has = available.get(key, Available())
            whole = not cut_at or (room is not None and room <= cut_at)
            return whole and all(have for have, want in zip(has, wanted, strict=True) if want)

        return {passage for key, passage in equal.items() if is_complete(key)}

    def encode(self, texts: Sequence[str], *, dense: bool = True) -> Encoded:
        """Compute vectors of N passages, and the signals that the collection keeps.

        Without `dense` there are N vectors of no width.
        """
        model = self._model
        codec, lexical = self.codec(), self.settings.lexical
        if isinstance(model, BGEM3Embeddings) and (lexical or codec or model is self.embeddings):
            return _encoded(model, texts, lexical, codec, dense)
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
        """Store passages of different ids, and replace those that are stored under these."""
        _check_finite(records, encoded.vectors)
        keys = [r.key for r in records]
        former = {key_of(r.id, stored[r.id][0]) for r in records if r.id in stored}
        with self._writing():
            self.signals.put(keys, encoded)
            self.collection.upsert(
                ids=[r.id for r in records],
                documents=[r.text for r in records],
                metadatas=[_replacing(r, stored) for r in records],
                embeddings=encoded.vectors,
            )
            self.signals.delete(sorted(former.difference(keys)))

    def delete(self, **which: Any) -> None:
        """Delete passages by `ids`, `where` or `where_document`."""
        for batch in batch_iterate(self.session.batch_size, self.ids(**which)):
            keys = [key_of(passage, text) for passage, (text, _) in self.stored(batch).items()]
            with self._writing():
                self.collection.delete(batch)
                self.signals.delete(keys)

    def drop(self) -> None:
        """Delete the collection and its signals."""
        name = self.collection.name
        with self.session.writing, self.session.exclusive():
            self.signals.drop()
            for deleted in (name, f"{name}{COPY}"):
                with contextlib.suppress(NotFoundError):
                    self.session.client.delete_collection(deleted)
        self.collection.forget()

    def add_missing(self) -> int:
        """Compute the signals that passages lack, and count these passages."""
        self.acquire_writer()
        added = 0
        for batch in batch_iterate(_PAGE, self.ids()):
            texts = {key_of(p, text): text for p, (text, _) in self.stored(batch).items()}
            added += self._add_missing(texts)
        return added

    def _add_missing(self, texts: Mapping[str, str]) -> int:
        settings, available = self.settings, self.signals.available(list(texts))
        found = {key: available.get(key, Available()) for key in texts}
        lacking = [
            key
            for key, has in found.items()
            if (settings.lexical and not has.lexical) or (settings.colbert and not has.codes)
        ]
        if lacking:
            encoded = self.encode([texts[key] for key in lacking], dense=False)
            added = encoded.added_to([found[key] for key in lacking])
            with self._writing():
                self.signals.put(lacking, added)
        return len(lacking)

    def scores(self, query: M3Encoding, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Score stored passages by the outputs of one query, `(N,)` for each, after a refresh.

        NaN is of a passage that is not stored with this text, or without the signal.
        """
        scores = {}
        if query.dense is not None:
            scores["dense"] = self._dense_scores(query.dense[0], keys)
        if query.lexical is not None:
            self.index.sync()
            scores["lexical"] = self.index.scores(query.lexical[0]).of(keys)
        if query.colbert is not None:
            scores["colbert"] = self._colbert_scores(query.colbert[0], keys)
        return scores

    def _dense_scores(
        self, vector: NDArray[np.float32], keys: Sequence[str]
    ) -> NDArray[np.float32]:
        scores = np.full(len(keys), np.nan, np.float32)  # (N,)
        rows_of = {key: row for row, key in enumerate(keys)}
        columns = ["documents", "embeddings"]
        found = self.collection.get(list(map(passage_of, keys)), include=columns)
        rows = zip(found["ids"], *(found[name] for name in columns), strict=True)
        vectors = {key_of(passage, text or ""): v for passage, text, v in rows}
        stored = [key for key in rows_of if key in vectors]
        if stored:
            chosen = np.array([vectors[key] for key in stored], np.float32)  # (M, D)
            scores[[rows_of[key] for key in stored]] = cosines(chosen, vector)
        return scores

    def _colbert_scores(
        self, query: NDArray[np.float32], keys: Sequence[str]
    ) -> NDArray[np.float32]:
        scores = np.full(len(keys), np.nan, np.float32)  # (N,)
        codec = self._codec
        codes = self.signals.codes(keys) if codec else {}
        rows = [row for row, key in enumerate(keys) if key in codes]
        if codec and rows:
            scores[rows] = codec.maxsim(query, [codes[keys[row]] for row in rows])
        return scores

    def colbert_vectors(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Look up ColBERT vectors by key, `(T, D)`, of passages that have one for each token."""
        self.refresh()
        codec = self._codec
        if codec is None or codec.pooling > 1:
            return {}
        return {key: codec.decompress(codes) for key, codes in self.signals.codes(keys).items()}


def _encoded(
    model: BGEM3Embeddings, texts: Sequence[str], lexical: bool, codec: Codec | None, dense: bool
) -> Encoded:
    """Encode texts in parts, and reduce their large ColBERT vectors to codes part by part."""
    outputs = {"dense": dense, "lexical": lexical, "colbert": codec is not None}
    vectors, cut_at, tokens = [], [], 0
    weights: list[bytes] = []
    codes: list[bytes] = []
    for part in colbert_windows(texts) if codec else [texts]:
        encoding = model.encode(part, **outputs)
        none = np.empty((len(part), 0), np.float32)
        vectors.append(none if encoding.dense is None else encoding.dense)
        weights += map(pack, encoding.lexical or ())
        codes += map(codec.compress, encoding.colbert or ()) if codec else ()
        cut_at += [model.max_length or 0 if cut else None for cut in encoding.truncated]
        tokens += int(encoding.token_counts.sum())
    return Encoded(np.concatenate(vectors), weights or None, codes or None, cut_at, tokens)


def _check_finite(records: Sequence[Record], vectors: NDArray[np.float32]) -> None:
    finite = np.isfinite(vectors).all(axis=1)  # (N,)
    if not finite.all():
        msg = (
            f"The vector of document {records[int(finite.argmin())].position} is not finite. "
            "Leave the document out, or use embeddings that can take it."
        )
        raise FloatingPointError(msg)


def _replacing(record: Record, stored: Stored) -> dict[str, Any] | None:
    """Make metadata with None for former keys, which Chroma would keep."""
    _, former = stored.get(record.id, ("", {}))
    gone = dict.fromkeys(former.keys() - record.metadata.keys())
    return {**record.metadata, **gone} or None
