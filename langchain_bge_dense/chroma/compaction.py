"""Compaction: a collection written anew without what deletes have left behind."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense.chroma.collection import GuardedCollection
from langchain_bge_dense.chroma.session import COMPLETE, COPY
from langchain_bge_dense.chroma.signals import key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_bge_dense.chroma.passages import Passages
    from langchain_bge_dense.chroma.store import BGEM3Chroma

logger = logging.getLogger(__name__)

_PAGE = 1_000


@dataclass(frozen=True)
class CompactResult:
    """Size of a store after a run of `compact`, and its bytes before and after.

    Attributes:
        passages: How many the collection holds.
        bytes_before: Of the folder; 0 where the data is not in a folder of this machine.
        bytes_after: Likewise.
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

    Neither texts nor vectors of deleted passages are in any file afterwards, nor their words in
    Chroma's full-text index. It takes as long as `index_vectors` of the same passages, and room for
    a second copy. Stores that are open follow by themselves, and threads of this process that write
    wait. On a server nobody may write from elsewhere meanwhile: it would be lost.

    Args:
        store: A store of `open_chroma`.

    Returns:
        How large the folder was and is.

    Raises:
        FolderBusyError: Another process writes to the folder.
        OSError: The folder could not be written to; the disk is full.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> _ = store.add_texts(["one", "two"], ids=["a", "b"])
        >>> store.delete(["a"])
        >>> compact(store).passages
        1
    """
    passages = store.passages
    session, folder = passages.session, passages.session.folder
    passages.acquire_writer()
    before = folder.size() if folder else 0
    with session.writing, folder.named_errors() if folder else contextlib.nullcontext():
        count = _write_anew(passages)
        session.reopen()
        if folder:
            folder.vacuum()
    done = CompactResult(count, before, folder.size() if folder else 0)
    logger.info("Compacted: %s", done)
    return done


def _write_anew(passages: Passages) -> int:
    """Replace the collection and its signals, and count the passages."""
    ids = passages.ids()
    pages = batch_iterate(_PAGE, ids)
    keys = [key_of(p, text) for page in pages for p, (text, _) in passages.stored(page).items()]
    passages.signals.keep_only(keys, _replace)
    source = passages.collection
    _replace(source, lambda copy: _copy(source, copy, ids))
    return len(ids)


def _replace(collection: GuardedCollection, fill: Callable[[GuardedCollection], None]) -> None:
    """Replace a collection by a copy that a function fills."""
    session, name = collection.session, f"{collection.name}{COPY}"
    client = session.client
    with contextlib.suppress(NotFoundError):
        client.delete_collection(name)  # of a compaction that was killed
    settings = collection.configuration_json
    stored = {k: v for k, v in collection.metadata.items() if k != "hnsw:space"}
    client.create_collection(
        name,
        embedding_function=None,
        metadata={**stored, COMPLETE: False},
        configuration={k: settings[k] for k in ("hnsw", "spann") if settings.get(k)},  # type: ignore[arg-type]
    )
    filled = GuardedCollection(session, name)
    fill(filled)
    replace_by_copy(filled, collection.name)
    collection.forget()


def replace_by_copy(copy: GuardedCollection, name: str) -> None:
    """Give a complete copy the name of a collection, which is deleted if there is one."""
    session = copy.session
    with session.exclusive():
        copy.modify({COMPLETE: True})
        with contextlib.suppress(NotFoundError):
            session.client.delete_collection(name)
        copy.open().modify(name=name)
    copy.forget()


def _copy(source: GuardedCollection, target: GuardedCollection, ids: list[str]) -> None:
    for page in batch_iterate(_PAGE, ids):
        found = source.get(page, include=["documents", "metadatas", "embeddings"])
        target.upsert(
            ids=found["ids"],
            documents=found["documents"],
            metadatas=found["metadatas"],
            embeddings=found["embeddings"],
        )
