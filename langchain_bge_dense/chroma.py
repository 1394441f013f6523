"""Chroma collections that are right from the start, filled safely.

`open_chroma` gives a LangChain `Chroma` in cosine space that knows which model its vectors are of;
`index_documents` fills it from any iterable. Any `Embeddings` will do.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

try:
    from chromadb.errors import InternalError
    from langchain_chroma import Chroma
except ImportError as error:
    msg = (
        f"langchain_bge_dense.chroma needs {error.name}, which is not installed. "
        'Install it with: pip install "langchain-bge-dense[chroma]"'
    )
    raise ImportError(msg, name=error.name) from error

from langchain_bge_dense._collection import (
    Identity,
    claim,
    cosine_configuration,
    require_cosine,
)
from langchain_bge_dense._feed import Bar, achunks, chunks
from langchain_bge_dense._folder import no_room
from langchain_bge_dense._indexing import IndexResult, Run
from langchain_bge_dense._place import check_place, placed

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterable, Iterable

    from chromadb.api import ClientAPI
    from langchain_core.documents import Document
    from numpy.typing import ArrayLike

__all__ = ["IndexResult", "aindex_documents", "index_documents", "index_vectors", "open_chroma"]

_NAME = re.compile(r"(?!.*\.\.)[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")


def open_chroma(
    embeddings: Embeddings,
    collection_name: str = "langchain",
    *,
    persist_directory: str | os.PathLike[str] | None = None,
    client: ClientAPI | None = None,
    **chroma_options: Any,
) -> Chroma:
    """Open a collection in cosine space that holds vectors of these embeddings and of no others.

    The embeddings' fingerprint and dimension are written to a new collection and checked when it is
    opened again. A collection that plain Chroma filled is taken over if it is in cosine space and
    one of its texts, embedded again, gives the vector stored.

    Where the data is: in `persist_directory`; or with `client`, or on the server at `host` and
    `port`; or, with none of these, in memory, in a database that only this store uses and that ends
    with the process. To share a collection in memory, pass one `chromadb.EphemeralClient()` as
    `client` each time. A folder belongs to one process at a time; let several use a server.

    Args:
        embeddings: Any LangChain embeddings.
        collection_name: 3 to 512 characters of `[a-zA-Z0-9._-]`.
        persist_directory: A folder, made if there is none.
        client: A Chroma client of your own, `chromadb.HttpClient(...)` for example.
        chroma_options: Anything else for `langchain_chroma.Chroma`: `host`, `port`, `ssl`,
            `headers`, `tenant`, `database`, `collection_metadata`, `collection_configuration`...

    Returns:
        The store. Its relevance scores are cosines, clipped to 0..1.

    Raises:
        TypeError: `embeddings` are none.
        ValueError: The name is invalid, two places are given for the data, another space than
            cosine is asked for, or the collection has another space or another model's vectors.
        OSError: The folder could not be written to.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> store.add_texts(["a note"], ids=["1"])
        ['1']
    """
    _check_arguments(embeddings, collection_name)
    check_place(persist_directory=persist_directory, client=client, **chroma_options)
    identity = Identity.of(embeddings)
    options = {"relevance_score_fn": _relevance, **chroma_options}
    given = options.pop("collection_metadata", None) or {}
    require_cosine(given.get("hnsw:space", "cosine"), "collection_metadata")
    configuration = cosine_configuration(options.pop("collection_configuration", None))
    try:
        store = Chroma(
            collection_name,
            embeddings,
            collection_metadata={**given, **identity.metadata()},
            collection_configuration=configuration,  # type: ignore[arg-type]
            **placed(persist_directory, client, options),
        )
        claim(store._collection, embeddings, identity)  # noqa: SLF001 - what Chroma answered
    except InternalError as error:
        if persist_directory is None:
            raise
        raise no_room(persist_directory, error) from error
    return store


def index_documents(
    store: Chroma,
    documents: Iterable[Document],
    *,
    batch_size: int = 256,
    show_progress: bool = False,
    lexical: bool = False,
) -> IndexResult:
    """Embed and store the documents that the collection lacks.

    Documents are known by a hash of text and metadata, so that running this again embeds only what
    is new, and finishes what a killed run has begun. Documents are read a batch at a time, embedded
    and stored, before the next is read: a loader's `lazy_load()` of any length takes constant
    memory. Metadata that is None is left out, as Chroma does.

    Args:
        store: A store of `open_chroma`.
        documents: Any iterable.
        batch_size: Documents embedded and stored at once; less where Chroma takes less.
        show_progress: Show a bar over documents, with tokens per second and, where `documents` has
            a length, the time left.
        lexical: Store lexical weights of the same forward pass too, for `BGEM3Retriever`; documents
            that are there without them are embedded again. They are kept in a second collection,
            named by the first one's id, and stay out of the metadata.

    Returns:
        Counts of what was added, skipped and truncated, and its tokens.

    Raises:
        TypeError: `store` is no `Chroma`, an item no document, or its metadata of a type that
            Chroma cannot store. The error names the item's position; earlier batches are stored.
        ValueError: `batch_size` is below 1, the collection holds another model's vectors, metadata
            cannot be stored.
        FloatingPointError: A vector is not finite.
        ConnectionError: The Chroma server did not answer for a minute. What is stored
            stays; run it again.
        OSError: The folder could not be written to; the disk is full.
        RuntimeError: Another process has indexed into the same folder and still runs.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> from langchain_core.documents import Document
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> notes = [Document("one"), Document("two"), Document("one")]
        >>> index_documents(store, notes)
        IndexResult(added=2, skipped=1, truncated=0, tokens=0)
    """
    run = Run(store, batch_size, lexical=lexical)
    with Bar(documents, show=show_progress) as bar:
        for chunk in chunks(documents, run.batch_size):
            run.add(chunk)
            bar.show(run.done)
        return bar.end(run.done)


def index_vectors(
    store: Chroma,
    embedded: Iterable[tuple[Document, ArrayLike]],
    *,
    fingerprint: str,
    batch_size: int = 256,
    show_progress: bool = False,
) -> IndexResult:
    """Store the documents that the collection lacks, with vectors computed elsewhere.

    It is `index_documents` without a model: ids, checks and what happens when it is run again are
    the same, and a collection can be filled by both.

    Args:
        store: A store of `open_chroma`.
        embedded: Any iterable of documents with their vectors, `(D,)` each.
        fingerprint: `BGEM3Embeddings.fingerprint` of what computed them, kept with the vectors.
        batch_size: As for `index_documents`.
        show_progress: As for `index_documents`.

    Returns:
        Counts of what was added and skipped.

    Raises:
        ValueError: The fingerprint is not the collection's, a vector has another shape than its
            vectors, and whatever else `index_documents` raises it for.
        FloatingPointError: A vector is not finite.

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
        for chunk in chunks(embedded, run.batch_size):
            documents, vectors = zip(*chunk, strict=True)
            run.add(documents, vectors)
            bar.show(run.done)
        return bar.end(run.done)


async def aindex_documents(
    store: Chroma,
    documents: Iterable[Document] | AsyncIterable[Document],
    *,
    batch_size: int = 256,
    show_progress: bool = False,
    lexical: bool = False,
) -> IndexResult:
    """`index_documents` for an event loop; takes a loader's `alazy_load()` too.

    Reading, embedding and storing run in threads. A coroutine that is cancelled leaves the batch in
    hand to its thread, which finishes it, and begins no other.

    Args:
        store: As for `index_documents`.
        documents: Any iterable, or an asynchronous one.
        batch_size: As for `index_documents`.
        show_progress: As for `index_documents`.
        lexical: As for `index_documents`.

    Returns:
        As `index_documents`.

    Example:
        >>> import asyncio
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> from langchain_core.documents import Document
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> asyncio.run(aindex_documents(store, [Document("one")]))
        IndexResult(added=1, skipped=0, truncated=0, tokens=0)
    """
    run = await asyncio.to_thread(Run, store, batch_size, lexical=lexical)
    with Bar(documents, show=show_progress) as bar:
        async for chunk in achunks(documents, run.batch_size):
            await asyncio.to_thread(run.add, chunk)
            bar.show(run.done)
        return bar.end(run.done)


def _relevance(distance: float) -> float:
    """Cosine of a cosine distance, which rounding can put a hair outside 0..1."""
    return min(1.0, max(0.0, 1.0 - distance))


def _check_arguments(embeddings: object, collection_name: object) -> None:
    if not isinstance(embeddings, Embeddings):
        msg = (
            f"The embeddings are {type(embeddings).__name__}, not LangChain Embeddings. "
            "Pass BGEM3Embeddings() or another subclass."
        )
        raise TypeError(msg)
    if not isinstance(collection_name, str) or not _NAME.fullmatch(collection_name):
        msg = (
            f"{collection_name!r} is no name for a collection. Use 3 to 512 characters of "
            "[a-zA-Z0-9._-], a letter or digit first and last, and no two dots in a row."
        )
        raise ValueError(msg)
