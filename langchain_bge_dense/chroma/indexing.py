"""Indexing: embed and store the documents that a collection lacks, batch by batch."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterable, Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from langchain_core.documents import Document
from langchain_core.utils.aiter import abatch_iterate
from langchain_core.utils.iter import batch_iterate
from tqdm.auto import tqdm

from langchain_bge_dense._engine.calls import reporting
from langchain_bge_dense.chroma.records import record
from langchain_bge_dense.chroma.settings import Wanted
from langchain_bge_dense.chroma.signals import Encoded
from langchain_bge_dense.chroma.store import BGEM3Chroma

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    from langchain_bge_dense.chroma.records import Record

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class IndexResult:
    """Counts of a run of `index_documents` or `index_vectors`.

    Attributes:
        added: Documents that were stored.
        skipped: Documents that the collection, or the same input further up, had already.
        truncated: Documents among the added ones that were longer than the model takes.
        tokens: Of the added documents, before any cut; 0 if not `BGEM3Embeddings` embedded them.
    """

    added: int
    skipped: int
    truncated: int
    tokens: int = 0


def index_documents(
    store: BGEM3Chroma,
    documents: Iterable[Document],
    *,
    batch_size: int = 256,
    show_progress: bool = False,
    lexical: bool | None = None,
) -> IndexResult:
    """Embed and store the documents that the collection lacks.

    A document with an `id` is stored under it, and replaces what had that id; one without is
    known by a hash of text and metadata. Running this again embeds only what is new or was changed,
    what was truncated by a smaller `max_length`, and finishes what a killed run has begun.
    Documents are read a batch at a time, embedded and stored, before the next is read: a loader's
    `lazy_load()` of any length takes constant memory. Metadata that is None is left out, as Chroma
    does, and so are the scores that `BGEM3Retriever` adds.

    Args:
        store: A store of `open_chroma`.
        documents: Any iterable.
        batch_size: Documents embedded and stored at once; less where Chroma takes less.
        show_progress: Show a bar over documents, which moves with each batch of the model, with
            tokens per second and, where `documents` has a length, the time left.
        lexical: True decides it for the collection, as in `open_chroma`; None follows the store.

    Returns:
        Counts of what was added, skipped and truncated, and its tokens.

    Raises:
        TypeError: `store` is not of `open_chroma`, an item is not a document, or its metadata of a
            type that Chroma cannot store. The error names its position; earlier batches are stored.
        ValueError: `batch_size` is below 1, the collection holds another model's vectors, metadata
            cannot be stored.
        FloatingPointError: A vector is not finite.
        ConnectionError: The Chroma server did not answer for a minute. What is stored
            stays; run it again.
        OSError: The folder could not be written to; the disk is full.
        FolderBusyError: Another process writes to the same folder.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> from langchain_core.documents import Document
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> notes = [Document("one"), Document("two"), Document("one")]
        >>> index_documents(store, notes)
        IndexResult(added=2, skipped=1, truncated=0, tokens=0)
    """
    _check_iterable(documents)
    run = Run(store, batch_size, lexical=lexical)
    with Bar(documents, show=show_progress) as bar:
        for batch in batch_iterate(run.batch_size, documents):
            with reporting(bar.update):
                run.add(batch)
            bar.show(run.done)
        return bar.end(run.finish())


def index_vectors(
    store: BGEM3Chroma,
    embedded: Iterable[tuple[Document, ArrayLike] | tuple[Document, ArrayLike, bytes]],
    *,
    fingerprint: str,
    batch_size: int = 256,
    show_progress: bool = False,
) -> IndexResult:
    """`index_documents` with vectors computed elsewhere, by `embed_dataset` for example.

    They bring no lexical weights, which `store.add_missing()` computes.

    Args:
        store: A store of `open_chroma`.
        embedded: Any iterable of documents with their vectors, `(D,)` each, and, for a store that
            keeps ColBERT codes, with these, from the `colbert_column` of `embed_dataset`.
        fingerprint: `BGEM3Embeddings.fingerprint` of what computed them, kept with the vectors.
        batch_size: Documents stored at once.
        show_progress: Show a bar over documents.

    Returns:
        Counts of what was added and skipped.

    Raises:
        ValueError: The fingerprint is not the collection's, a vector has another shape than its
            vectors, or codes are of another kind; otherwise as `index_documents`.

    Example:
        >>> from langchain_core.documents import Document
        >>> embeddings = BGEM3Embeddings(model=checkpoint)
        >>> vector = embeddings.embed_documents(["one"])[0]
        >>> store = open_chroma(embeddings, "notes")
        >>> index_vectors(store, [(Document("one"), vector)], fingerprint=embeddings.fingerprint)
        IndexResult(added=1, skipped=0, truncated=0, tokens=0)
    """
    run = Run(store, batch_size, fingerprint=fingerprint)
    with Bar(embedded, show=show_progress) as bar:
        for batch in batch_iterate(run.batch_size, embedded):
            documents, *computed = zip(*batch, strict=True)
            run.add(documents, *computed)
            bar.show(run.done)
        return bar.end(run.finish())


async def aindex_documents(
    store: BGEM3Chroma,
    documents: Iterable[Document] | AsyncIterable[Document],
    *,
    batch_size: int = 256,
    show_progress: bool = False,
    lexical: bool | None = None,
) -> IndexResult:
    """Run `index_documents` for an event loop, also on a loader's `alazy_load()`.

    Reading, embedding and storing run in threads. A coroutine that is cancelled leaves the batch in
    hand to its thread, which finishes it, and begins no other.

    Args:
        store: A store of `open_chroma`.
        documents: Any iterable, or an asynchronous one.
        batch_size: Documents embedded and stored at once.
        show_progress: Show a bar over documents.
        lexical: Lexical weights, as in `index_documents`.

    Returns:
        What `index_documents` returns.
    """
    _check_iterable(documents)
    run = await asyncio.to_thread(Run, store, batch_size, lexical=lexical)
    with Bar(documents, show=show_progress) as bar:
        async for batch in _batches(documents, run.batch_size):
            with reporting(bar.update):
                await asyncio.to_thread(run.add, batch)
            bar.show(run.done)
        return bar.end(await asyncio.to_thread(run.finish))


class Run:
    """One call: where it writes, and its counts so far.

    Batches are cut by position in the input, and each is one write: a run after a kill embeds the
    same texts together, and gets the same vectors to the last bit.
    """

    def __init__(
        self,
        store: BGEM3Chroma,
        batch_size: int,
        *,
        lexical: bool | None = None,
        fingerprint: str | None = None,
    ) -> None:
        _check(store, batch_size)
        self._passages = passages = store.passages
        passages.acquire_writer()
        if lexical is not None:
            passages.add_signals(Wanted(lexical))
        if fingerprint is not None:
            passages.check_model(fingerprint)
        self._dimension = passages.settings.dimension
        self.batch_size = min(batch_size, passages.session.batch_size)
        self._added = self._seen = self._truncated = self._tokens = 0

    def add(
        self,
        batch: Sequence[Document],
        vectors: Sequence[ArrayLike] | None = None,
        codes: Sequence[bytes] | None = None,
    ) -> None:
        """Store those of the next documents that the collection lacks, by given vectors if any."""
        records = {r.id: r for r in map(record, batch, itertools.count(self._seen))}
        stored = self._passages.stored(list(records))
        complete = self._passages.complete(list(records.values()), stored, signals=vectors is None)
        new = [r for r in records.values() if r.id not in complete]
        if new:
            encoded = (
                self._passages.encode([r.text for r in new])
                if vectors is None
                else self._given(new, vectors, codes)
            )
            self._passages.write(new, encoded, stored)
            self._truncated += encoded.truncated
            self._tokens += encoded.tokens
        self._seen += len(batch)
        self._added += len(new)

    def _given(
        self, new: Sequence[Record], vectors: Sequence[ArrayLike], codes: Sequence[bytes] | None
    ) -> Encoded:
        """Choose the caller's vectors and codes for records."""
        rows = np.stack([self._row(vectors, r.position) for r in new])  # (N, D)
        codec = self._passages.codec()
        if codec is None or codes is None:
            return Encoded(rows)
        chosen = [codes[r.position - self._seen] for r in new]
        for one in chosen:
            codec.check(one)
        return Encoded(rows, codes=chosen)

    def _row(self, vectors: Sequence[ArrayLike], position: int) -> NDArray[np.float32]:
        """Check a vector of the caller's, `(D,)`."""
        with np.errstate(over="ignore"):
            row = np.asarray(vectors[position - self._seen], dtype=np.float32)
        if row.ndim != 1 or row.size != self._dimension:
            msg = (
                f"The vector of document {position} has the shape {row.shape}, and the collection "
                f"takes {self._dimension} numbers. Pass vectors of the collection's own model."
            )
            raise ValueError(msg)
        return row

    @property
    def done(self) -> IndexResult:
        """Counts so far."""
        skipped = self._seen - self._added
        return IndexResult(self._added, skipped, self._truncated, self._tokens)

    def finish(self) -> IndexResult:
        """Flush to the disk, and return the counts."""
        folder = self._passages.session.folder
        if self._added and folder:
            folder.flush()
        return self.done


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar over documents, with tokens per second and, where their number is known, time left."""

    def __init__(self, documents: object, *, show: bool) -> None:
        total = len(documents) if isinstance(documents, Sized) else None
        super().__init__(
            desc="Indexing",
            total=total,
            unit=" documents",
            mininterval=0,  # all that is reported is shown: there is little
            miniters=1,
            disable=not show,
        )

    def show(self, done: IndexResult) -> None:
        """Show the progress, and the tokens per second."""
        seconds = self.format_dict["elapsed"]
        if done.tokens and seconds:
            self.set_postfix_str(f"{done.tokens / seconds:,.0f} tokens/s", refresh=False)
        self.update(done.added + done.skipped - self.n)
        self.refresh()

    def end(self, done: IndexResult) -> IndexResult:
        """Show and log the result."""
        if done.tokens:
            self.set_postfix_str(f"{done.tokens:,} tokens, {done.truncated:,} documents truncated")
        logger.info("Indexed: %s", done)
        return done


async def _batches(documents: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """Read batches for an event loop, in a thread where the iterable is not asynchronous."""
    if isinstance(documents, AsyncIterable):
        async for batch in abatch_iterate(size, documents):
            yield batch
    else:
        synchronous = batch_iterate(size, documents)
        while batch := await asyncio.to_thread(lambda: next(synchronous, [])):
            yield batch


def _check(store: object, batch_size: int) -> None:
    if not isinstance(store, BGEM3Chroma):
        msg = (
            f"The store is {type(store).__name__}, not a BGEM3Chroma. Open its collection with "
            "open_chroma."
        )
        raise TypeError(msg)
    if batch_size < 1:
        msg = f"batch_size is {batch_size}. Use 1 or more."
        raise ValueError(msg)


def _check_iterable(documents: object) -> None:
    if isinstance(documents, (Document, str)) or not isinstance(
        documents, (Iterable, AsyncIterable)
    ):
        msg = (
            f"The documents are {type(documents).__name__}, not an iterable of Documents. "
            "Put a single one into a list: [document]."
        )
        raise TypeError(msg)
