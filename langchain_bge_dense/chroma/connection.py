"""A store's way to its Chroma: in this process, on disk or in memory, or on a server."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from chromadb.config import Settings
from chromadb.errors import InternalError, NotFoundError, RateLimitError
from tenacity import (
    RetryError,
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from langchain_bge_dense.chroma.collection import cosine_configuration, local_client
from langchain_bge_dense.chroma.recovery import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

    from langchain_bge_dense.chroma.recovery import Folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

COPY = ".compact"
"""End of the name of the copy that compaction writes."""
COMPLETE = "complete_copy"
"""Key in its metadata: whether it holds all."""
_LONGEST_NAME = 512
_ATTEMPTS = 10  # at reading beside a process that writes

RETRYING = Retrying(
    retry=retry_if_exception_type((httpx.TransportError, RateLimitError)),
    wait=wait_exponential(max=30),
    stop=stop_after_delay(60),
    before_sleep=before_sleep_log(logger, logging.WARNING),
)
"""Of calls to a server that does not answer."""


def retried(call: Callable[[], T]) -> T:
    """Call Chroma, and again after a while where its server does not answer.

    Raises:
        ConnectionError: It did not answer for a minute.
    """
    try:
        return RETRYING.copy()(call)
    except RetryError as error:
        attempt = error.last_attempt
        msg = (
            f"The Chroma server did not answer {attempt.attempt_number} times: "
            f"{attempt.exception()}. "
            "Start it and run this again; what is stored is not embedded again."
        )
        raise ConnectionError(msg) from attempt.exception()


class Connection:
    """A client of Chroma, replaced underneath when another process has written to its folder.

    Args:
        client: The client.
        folder: Where its Chroma keeps the data, if that is in this process and on disk.
        names: Its tenant and database where the folder can be opened again; None: it belongs to
            the caller, and stays as it is.
    """

    def __init__(
        self, client: ClientAPI, folder: Folder | None, names: dict[str, str] | None
    ) -> None:
        self.client, self.folder = client, folder
        # Held while passages and what belongs to them are written, and during a compaction.
        self.writing = folder.writing if folder else threading.RLock()
        self.generation = 0
        self._names = names
        self._process = os.getpid()
        self._closed = False
        self._version: int | None = None
        self._folder_generation = folder.generation if folder else 0
        self._release: weakref.finalize[..., Any] | None = None

    @classmethod
    def local(cls, path: str | os.PathLike[str] | None, names: dict[str, str]) -> Connection:
        """To the Chroma of this process, in a folder or in memory."""
        if path is None:
            return cls(local_client(None, **names), None, {})
        folder = folder_of(path)
        return cls(folder.client(names), folder, names)

    @classmethod
    def of(cls, client: ClientAPI) -> Connection:
        """With a client of the caller's."""
        settings = client.get_settings()
        return cls(
            client, folder_of(settings.persist_directory) if settings.is_persistent else None, None
        )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Without writes by others, where the data is in a folder."""
        with self.folder.exclusive() if self.folder else contextlib.nullcontext():
            yield

    def check(self) -> None:
        """Refuse use after closing, and in a forked child.

        Raises:
            RuntimeError: It is one of them.
        """
        if self._process != os.getpid():
            msg = (
                f"The store was opened by process {self._process} and is used in its forked child "
                f"{os.getpid()}, where Chroma's threads are gone. Open it in the child, by "
                "open_chroma, or start the child with the method 'spawn'."
            )
            raise RuntimeError(msg)
        if self._closed:
            msg = "The store is closed. Open it again by open_chroma."
            raise RuntimeError(msg)

    def collection(self, name: str, *, create: bool = False) -> Collection | None:
        """A collection by its name, read from the disk; None: it does not exist."""
        found = self._find(name) or self._complete_copy(name)
        if found is None and create:
            configuration: Any = cosine_configuration(None)
            found = self.client.get_or_create_collection(
                name, configuration=configuration, embedding_function=None
            )
        if self.folder and found is not None:
            self.folder.load(found)
        return found

    def _find(self, name: str) -> Collection | None:
        try:
            return self.client.get_collection(name, embedding_function=None)
        except NotFoundError:
            return None
        except InternalError as error:
            if self.folder is None or self.folder.is_there():
                raise
            raise self.folder.error(error) from error

    def _complete_copy(self, name: str) -> Collection | None:
        """What a compaction that was killed had yet to put in the place of a collection."""
        copy = self._find(f"{name}{COPY}") if len(name) + len(COPY) <= _LONGEST_NAME else None
        if copy is None or (copy.metadata or {}).get(COMPLETE) is not True:
            return None
        copy.modify(name=name)
        return copy

    def seen(self) -> None:
        """Remember that what is stored now has been read."""
        self._version = self.version()

    def version(self) -> int | None:
        """A number that changes with what is stored; None: nothing tells."""
        return self.folder.version() if self.folder else None

    def refresh(self) -> None:
        """Open the folder again if another process has written to it, once in a while."""
        if self.folder is None or self._names is None or self._version is None:
            return
        with self.folder.lock:
            if self._folder_generation != self.folder.generation:
                self._reconnect(reopen=False)
            elif self.folder.is_stale(self._version):
                self._reconnect(reopen=True)

    def acquire_writer(self) -> None:
        """Make this the process that writes; what another one has written before is read first.

        Raises:
            RuntimeError: Another process writes.
        """
        self.check()
        if self.folder is None or self._release is not None:
            return
        first = self.folder.acquire_writer(id(self))
        self._release = weakref.finalize(self, self.folder.release_writer, id(self))
        if first and self._names is not None and self.version() != self._version:
            self._reconnect(reopen=True)

    def write(
        self, collection: Callable[[], Any], records: int, call: Callable[[Any], object]
    ) -> None:
        """Call a collection to write to it: recoverable in a folder, patient with a server.

        Args:
            collection: Gives the collection, as it is now.
            records: How many it writes.
            call: Takes the collection.
        """
        if self.folder is None:
            retried(lambda: self.read(lambda: call(collection())))
        else:
            found = collection()
            with self.folder.write(found, records):
                call(found)

    def read(self, call: Callable[[], T]) -> T:
        """Call Chroma, and again if another process has just written or compacted."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return call()
            except NotFoundError:  # noqa: PERF203 - what fails is rare
                self.reopen()
            except InternalError:
                if self.folder is None or self._names is None:
                    raise
                self.reopen()
        return call()

    def reopen(self) -> None:
        """Read everything again."""
        if self.folder is None or self._names is None:
            self.generation += 1
        else:
            self._reconnect(reopen=True)

    def close(self) -> None:
        """Free Chroma's memory and files, and let other processes write."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        if self._release:
            self._release()
        if self._names is not None:
            self.client.close()  # type: ignore[attr-defined]

    def _reconnect(self, *, reopen: bool) -> None:
        folder, names = self.folder, self._names
        if folder is None or names is None:
            return
        former, self.client = self.client, folder.client(names, reopen=reopen)
        former.close()  # type: ignore[attr-defined]
        self._folder_generation = folder.generation
        self.generation += 1


def without_telemetry() -> Settings:
    """Settings of a client of a server."""
    return Settings(anonymized_telemetry=False)
