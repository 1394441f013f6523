"""A collection that plain Chroma filled becomes a store, without embedding its texts again."""

from __future__ import annotations

import logging
import warnings
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.utils.iter import batch_iterate
from tqdm.auto import tqdm

from langchain_bge_dense._engine.calls import reporting
from langchain_bge_dense.chroma.collection import GuardedCollection
from langchain_bge_dense.chroma.compaction import replace_by_copy
from langchain_bge_dense.chroma.contents import Contents, Found, Origin, have_length, records_of
from langchain_bge_dense.chroma.folder import require_database
from langchain_bge_dense.chroma.records import Record, record
from langchain_bge_dense.chroma.session import COMPLETE, COPY, connect
from langchain_bge_dense.chroma.settings import KEY, Wanted
from langchain_bge_dense.chroma.signals import Encoded
from langchain_bge_dense.chroma.store import BGEM3Chroma, open_chroma, session_at

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from chromadb.api import ClientAPI
    from langchain_core.embeddings import Embeddings

    from langchain_bge_dense._codes import Kind
    from langchain_bge_dense.chroma.passages import Passages
    from langchain_bge_dense.chroma.session import Session

logger = logging.getLogger(__name__)

_BATCH = 256  # records written at once
_FROM = "adopted_from"
"""Key in the metadata of a store: id of the collection that it was copied from."""


def adopt(  # noqa: PLR0913 - those of `open_chroma`, and three
    embeddings: Embeddings,
    collection_name: str = "langchain",
    *,
    source: Chroma | None = None,
    source_max_length: int | None = None,
    persist_directory: str | os.PathLike[str] | None = None,
    client: ClientAPI | None = None,
    lexical: bool | None = None,
    colbert: Kind | bool | None = None,
    colbert_pooling: int = 1,
    show_progress: bool = False,
    **chroma_options: Any,
) -> BGEM3Chroma:
    """Make a store of a collection that plain Chroma filled, without embedding its texts again.

    The vectors are copied at unit length into a new collection in cosine space, with their ids,
    texts and metadata, a page at a time. First ten texts of different lengths are embedded again,
    and must have a cosine of 0.99 to their stored vectors. With `lexical` or `colbert` the model
    computes these signals of all texts on the way; a vector that is not finite or has no length is
    computed, too.

    The collection stays as it is until the copy is complete, which then replaces it, unless it is a
    `source` of another name or location. Another run finishes one that was killed, and
    of a collection that is a store already nothing is copied. Let nobody write to it meanwhile.

    Records without a text, which LangChain never finds, are not copied: a warning tells how many
    there are, and a collection that has any is not replaced.

    Args:
        embeddings: The model that filled the collection.
        collection_name: Name of the store.
        source: The collection, anywhere; by default the one at the store's own name and location.
        source_max_length: Tokens at which the other tool cut texts. Longer ones are embedded again,
            as their vectors are of their beginning alone. By default none may be cut, which is
            checked.
        persist_directory: As in `open_chroma`; this, `client` or another location is needed.
        client: As in `open_chroma`.
        lexical: As in `open_chroma`.
        colbert: As in `open_chroma`.
        colbert_pooling: As in `open_chroma`.
        show_progress: Show a bar over records.
        chroma_options: As in `open_chroma`.

    Returns:
        The store.

    Raises:
        AnotherModelError: The vectors are another model's.
        ValueError: There is no such collection, the name of the store is taken, a text is longer
            than the other tool took, a record without text would be lost, or metadata have a key
            that `BGEM3Retriever` writes; otherwise as `open_chroma`.
        RuntimeError: Somebody wrote to the collection meanwhile.

    Example:
        >>> from langchain_chroma import Chroma
        >>> embeddings = BGEM3Embeddings(model=checkpoint)
        >>> _ = Chroma("notes", embeddings, persist_directory="db").add_texts(["a note"])
        >>> with adopt(embeddings, "notes", persist_directory="db", lexical=True) as store:
        ...     store.get()["documents"], store.lexical
        (['a note'], True)
    """
    Wanted.of(lexical, colbert, colbert_pooling).check(embeddings)
    origin = Origin(embeddings, source_max_length)
    where: Any = {"persist_directory": persist_directory, "client": client, **chroma_options}
    signals: Any = {"lexical": lexical, "colbert": colbert, "colbert_pooling": colbert_pooling}

    def open_(name: str, metadata: Mapping[str, Any] | None = None) -> BGEM3Chroma:
        given = {**(metadata or {}), **(chroma_options.get("collection_metadata") or {})}
        options = {**where, **signals, "collection_metadata": given}
        return open_chroma(embeddings, name, **options)

    if source is None:
        require_database(persist_directory)
    with closing(session_at(**where)) as session:
        _check_shared(session, client)
        session.acquire_writer()
        target = GuardedCollection(session, collection_name)
        adoption = Adoption(target if source is None else _collection_of(source), target)
        if not adoption.is_done:
            adoption.check(origin)
            adoption.run(origin, open_, show_progress=show_progress)
        store = open_(collection_name)  # before Chroma lets go of what it has in memory
    if adoption.is_done:
        store.add_missing()
    return store


class Adoption:
    """A collection on its way to a store.

    Args:
        old: The collection.
        target: Of the store's name, at the store's location.

    Attributes:
        is_done: Whether the target is a store of the collection already.

    Raises:
        ValueError: There is no such collection, or the target is another one.
    """

    def __init__(self, old: GuardedCollection, target: GuardedCollection) -> None:
        self._old, self._target = old, target
        found, there = old.find(), target.find()
        if found is None:
            names = [each.name for each in old.session.client.list_collections()]
            msg = f"There is no collection {old.name!r} among {names}. Correct collection_name."
            raise ValueError(msg)
        self._id, metadata = str(found.id), (there and there.metadata) or {}
        self._in_place = there is not None and there.id == found.id
        self.is_done = _FROM in metadata or (self._in_place and KEY in metadata)
        if there and not self._in_place and metadata.get(_FROM) != self._id:
            msg = (
                f"Collection {target.name!r} exists already, and is not a store of the source. "
                "Take another collection_name, or delete it."
            )
            raise ValueError(msg)

    def check(self, origin: Origin) -> None:
        """Check that the vectors are the model's, and that nothing would be lost."""
        contents, name = Contents(self._old), self._old.name
        sample = contents.sample()
        if sample.texts:
            origin.check(name, sample)
        elif contents.records:
            msg = (
                f"Collection {name!r} has no texts, so that nothing shows which model filled it. "
                "Index its documents into a new collection."
            )
            raise ValueError(msg)
        if contents.textless:
            self._tell(
                f"{contents.textless:,} of {contents.records:,} records of collection {name!r} "
                f"have no text, {contents.first_textless!r} is the first"
            )

    def _tell(self, lacking: str) -> None:
        """Warn of records without a text, or refuse to lose them."""
        if self._in_place:
            msg = (
                f"{lacking}, and would be lost. Delete them, or keep the collection: pass it as "
                "source, and another collection_name."
            )
            raise ValueError(msg)
        warnings.warn(f"{lacking}. They are not copied: no search finds them.", stacklevel=4)

    def run(
        self, origin: Origin, open_: Callable[..., BGEM3Chroma], *, show_progress: bool
    ) -> None:
        """Copy what an earlier run has not copied, and replace the collection by the copy.

        Args:
            origin: What embedded the texts.
            open_: Opens a store by its name.
            show_progress: Show a bar.
        """
        folder = self._target.session.folder
        with self._copy(open_) as copy, folder.named_errors() if folder else nullcontext():
            copied = self._fill(copy.passages, origin, show_progress=show_progress)
            if copy.passages.collection.count() != copied:
                self._delete_others(copy.passages)
            self._finish(copy.passages)
        logger.info("Adopted: %s passages as %r", f"{copied:,}", self._target.name)

    def _copy(self, open_: Callable[..., BGEM3Chroma]) -> BGEM3Chroma:
        """Open the store to write, with what an earlier run has written."""
        carried = {k: v for k, v in self._old.metadata.items() if not k.startswith("hnsw:")}
        carried = {**carried, _FROM: self._id, COMPLETE: False}
        carried.pop(KEY, None)  # of a store, which has settings of its own
        copy = open_(f"{self._target.name}{COPY}", carried)
        copy.passages.collection.modify(carried)  # of a run before it may be for another source
        return copy

    def _fill(self, passages: Passages, origin: Origin, *, show_progress: bool) -> int:
        """Write the missing passages, and count all."""
        total, done, copied = self._old.count(), 0, 0
        with tqdm(desc="Adopting", total=total, unit=" records", disable=not show_progress) as bar:
            for batch in batch_iterate(_BATCH, records_of(self._old, vectors=True)):
                with_text = [found for found in batch if found.text is not None]
                with reporting(bar.update):
                    _add(passages, with_text, origin)
                done, copied = done + len(batch), copied + len(with_text)
                bar.update(done - bar.n)
        if done != (total := self._old.count()):
            msg = (
                f"Collection {self._old.name!r} has {total:,} records, and {done:,} were read: "
                "somebody writes to it. Stop that, and run this again, which goes on."
            )
            raise RuntimeError(msg)
        return copied

    def _delete_others(self, passages: Passages) -> None:
        """Delete what was deleted from the collection since a run before copied it."""
        known = self._old.get(include=[])["ids"]
        passages.delete(ids=sorted(set(passages.ids()).difference(known)))

    def _finish(self, passages: Passages) -> None:
        replace_by_copy(passages.collection, self._target.name)
        if folder := passages.session.folder:
            if self._in_place:
                passages.session.reopen()
                folder.vacuum()
            folder.flush()


def _add(passages: Passages, batch: Sequence[Found], origin: Origin) -> None:
    """Write those records of a batch that are missing."""
    records = [
        record(Document(found.text or "", metadata=dict(found.metadata or {}), id=found.id), n)
        for n, found in enumerate(batch)
    ]
    stored = passages.stored([each.id for each in records])
    complete = passages.complete(records, stored, signals=True)
    copied: list[int] = []
    embedded: list[int] = []
    for n, found in enumerate(batch):
        if found.id not in complete:
            again = not have_length(found.vector) or origin.has_cut(records[n].text)
            (embedded if again else copied).append(n)
    if embedded:
        chosen = [records[n] for n in embedded]
        passages.write(chosen, passages.encode([each.text for each in chosen]), stored)
    if copied:
        chosen = [records[n] for n in copied]
        passages.write(
            chosen, _encoded(passages, chosen, [batch[n].vector for n in copied]), stored
        )


def _encoded(passages: Passages, records: Sequence[Record], vectors: Sequence[Any]) -> Encoded:
    """Scale vectors to unit length, and compute the signals of the texts."""
    rows = np.array(vectors, np.float64)  # (N, D)
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    if not (passages.settings.lexical or passages.settings.colbert):
        return Encoded(unit)
    signals = passages.encode([each.text for each in records], dense=False)
    return signals._replace(vectors=unit)


def _check_shared(session: Session, client: ClientAPI | None) -> None:
    """Check that the data is in a folder, a client or a server, and not in new memory."""
    if client is None and not session.location:
        msg = "adopt has no location for the store. Pass persist_directory, client or host."
        raise ValueError(msg)


def _collection_of(source: object) -> GuardedCollection:
    """Open the collection of the caller's `Chroma`."""
    if not isinstance(source, Chroma):
        msg = (
            f"source is {type(source).__name__}. Pass the Chroma that has the collection: "
            'langchain_chroma.Chroma("langchain", persist_directory="db").'
        )
        raise TypeError(msg)
    session = connect(None, source._client, {})  # noqa: SLF001 - there is no public way
    return GuardedCollection(session, source._collection_name)  # noqa: SLF001 - likewise
