"""Compaction: a collection written anew without what deletes have left behind."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense.chroma.connection import COMPLETE, COPY

if TYPE_CHECKING:
    from collections.abc import Callable

    from chromadb.api.models.Collection import Collection

    from langchain_bge_dense.chroma.connection import Connection
    from langchain_bge_dense.chroma.passages import Passages
    from langchain_bge_dense.chroma.store import BGEM3Chroma

logger = logging.getLogger(__name__)

_PAGE = 1_000


@dataclass(frozen=True)
class CompactResult:
    """What `compact` did.

    Attributes:
        passages: How many the collection holds.
        bytes_before: Of the folder; 0 where the data is not in a folder of this machine.
        bytes_after: Likewise.

    Example:
        >>> CompactResult(passages=2, bytes_before=300, bytes_after=200).freed
        100
    """

    passages: int
    bytes_before: int
    bytes_after: int

    @property
    def freed(self) -> int:
        """Bytes that were given back."""
        return self.bytes_before - self.bytes_after


def compact(store: BGEM3Chroma) -> CompactResult:
    """Write a collection anew, so that nothing is left of what was deleted or replaced.

    The vector index is built again without deleted vectors, lexical weights are written without
    those of deleted passages, and the database gives back its free space: neither texts nor vectors
    of deleted passages are in any file afterwards, nor their words in Chroma's full-text index. It
    takes as long as `index_vectors` of the same passages, and room for a second copy. Killed at any
    moment it leaves the old collection or the new one. The collection's id changes; stores that are
    open follow by themselves, and threads of this process that write wait. On a server nobody may
    write from elsewhere meanwhile: it would be lost.

    Args:
        store: A store of `open_chroma`.

    Returns:
        How large the folder was and is.

    Raises:
        RuntimeError: Another process writes to the folder.
        OSError: The folder could not be written to; the disk is full.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> _ = store.add_texts(["one", "two"], ids=["a", "b"])
        >>> store.delete(["a"])
        >>> compact(store).passages
        1
    """
    passages: Passages = store._passages  # noqa: SLF001 - its own package's
    connection, folder = passages.connection, passages.connection.folder
    connection.acquire_writer()
    before = folder.size() if folder else 0
    with connection.writing, folder.named_errors() if folder else contextlib.nullcontext():
        count = _write_anew(passages)
        connection.reopen()
        if folder:
            folder.vacuum()
    done = CompactResult(count, before, folder.size() if folder else 0)
    logger.info("Compacted: %s", done)
    return done


def _write_anew(passages: Passages) -> int:
    """Replace all collections of some passages; gives how many passages there are."""
    collection, replace = passages.collection, partial(_replace, passages.connection)
    ids = collection.get(include=[])["ids"]
    keys = [key for page in batch_iterate(_PAGE, ids) for key in passages.keys(page)]
    for companion in passages.companions:
        companion.compact(keys, replace)
    replace(collection, lambda copy: _copy(collection, copy, ids))
    return len(ids)


def _replace(
    connection: Connection, collection: Collection, fill: Callable[[Collection], None]
) -> None:
    """Put a copy that a function fills in the place of a collection."""
    client, name = connection.client, f"{collection.name}{COPY}"
    with contextlib.suppress(NotFoundError):
        client.delete_collection(name)  # of a compaction that was killed
    settings = collection.configuration_json
    stored = {k: v for k, v in (collection.metadata or {}).items() if k != "hnsw:space"}
    copy = client.create_collection(
        name,
        embedding_function=None,
        metadata={**stored, COMPLETE: False},
        configuration={k: settings[k] for k in ("hnsw", "spann") if settings.get(k)},  # type: ignore[arg-type]
    )
    fill(copy)
    with connection.exclusive():
        copy.modify(metadata={**stored, COMPLETE: True})
        client.delete_collection(collection.name)
        copy.modify(name=collection.name)


def _copy(source: Collection, target: Collection, ids: list[str]) -> None:
    for page in batch_iterate(_PAGE, ids):
        found: Any = source.get(ids=page, include=["documents", "metadatas", "embeddings"])
        target.upsert(
            ids=found["ids"],
            documents=found["documents"],
            metadatas=found["metadatas"],
            embeddings=found["embeddings"],
        )
