"""Sessions with a Chroma in memory, in a folder or on a server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import chromadb
import httpx
from chromadb.api import ClientAPI
from chromadb.config import Settings
from chromadb.errors import InternalError, NotFoundError, RateLimitError
from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from langchain_bge_dense._retries import given_up
from langchain_bge_dense.chroma.folder import check_process, folder_of, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chromadb.api.models.Collection import Collection

    from langchain_bge_dense.chroma.folder import Folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

COPY = ".compact"
"""Suffix of the name of the copy that compaction or adoption writes."""
COMPLETE = "complete_copy"
"""Key in the metadata of the copy: whether the copy is complete."""
_LONGEST_NAME = 512
_ATTEMPTS = 10  # at reading beside a process that writes
_BODY = 36 << 20  # bytes of a request to a server, which takes 40 MiB

RETRYING = Retrying(
    retry=retry_if_exception_type((httpx.TransportError, RateLimitError)),
    wait=wait_exponential(max=30),
    stop=stop_after_delay(60),
    before_sleep=before_sleep_log(logger, logging.WARNING),
    retry_error_callback=given_up(
        "The Chroma server",
        "Start it and run this again; what is stored is not embedded again.",
    ),
)
"""Retries calls to a server that does not answer."""


def retried(call: Callable[[], T]) -> T:
    """Call Chroma, and retry if its server does not answer."""
    return RETRYING.copy()(call)


class Session:
    """A client of a Chroma in memory or on a server; what was read from it is of one epoch.

    Attributes:
        epoch: Another one begins when everything has to be read again.
        writing: Held while passages and their signals are written, and during a compaction.
    """

    folder: Folder | None = None
    outdated: tuple[type[Exception], ...] = (NotFoundError,)
    """Errors of a call after another process has written or compacted."""

    def __init__(self, client: ClientAPI) -> None:
        self.client = client
        self.epoch = 0
        self.writing = threading.RLock()
        self._process = os.getpid()
        self._closed = False

    @functools.cached_property
    def batch_size(self) -> int:
        """Records that Chroma takes at once."""
        return retried(self.client.get_max_batch_size)

    @functools.cached_property
    def body(self) -> int | None:
        """Bytes that a server takes at once."""
        api = self.client.get_settings().chroma_api_impl
        return None if "Rust" in api or "Segment" in api else _BODY

    @property
    def location(self) -> str:
        """Folder or URL of the Chroma; empty for one in memory."""
        settings = self.client.get_settings()
        host, port = settings.chroma_server_host, settings.chroma_server_http_port
        scheme = "https" if settings.chroma_server_ssl_enabled else "http"
        return f"{scheme}://{host}:{port}" if host else ""

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep others from writing, where the data is in a folder."""
        yield

    def version(self) -> int | None:
        """Read a number that changes with what is stored, where there is one."""
        return None

    def refresh(self) -> None:
        """Check that the session is usable. Begin another epoch if another process has written."""
        if self._process != os.getpid():
            msg = (
                f"The store was opened by process {self._process} and is used in its forked child "
                f"{os.getpid()}, where Chroma's threads are gone. Start the child with the method "
                "'spawn' and open the store there, or let both use a Chroma server."
            )
            raise RuntimeError(msg)
        if self._closed:
            msg = "The store is closed. Open it again by open_chroma."
            raise RuntimeError(msg)

    def reopen(self) -> None:
        """Begin another epoch: read everything again."""
        self.epoch += 1

    def acquire_writer(self) -> None:
        """Make this the process that writes, where only one may."""
        self.refresh()

    def find(self, name: str) -> Collection | None:
        """Open a collection, or the complete copy that a killed compaction did not rename."""
        if (found := self._find(name)) is not None or len(name) + len(COPY) > _LONGEST_NAME:
            return found
        copy = self._find(f"{name}{COPY}")
        if copy is None or (copy.metadata or {}).get(COMPLETE) is not True:
            return None
        copy.modify(name=name)
        return copy

    def _find(self, name: str) -> Collection | None:
        try:
            return retried(lambda: self.client.get_collection(name, embedding_function=None))
        except NotFoundError:
            return None

    def read(self, call: Callable[[], T]) -> T:
        """Call Chroma, and again if another process has just written or compacted."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._call(call)
            except self.outdated:  # noqa: PERF203 - what fails is rare
                self.reopen()
        return self._call(call)

    def _call(self, call: Callable[[], T]) -> T:
        return retried(call)

    def write(
        self,
        open_: Callable[[], Collection],
        records: int,  # noqa: ARG002 - a folder counts them
        call: Callable[[Collection], object],
    ) -> None:
        """Call a collection to write some records to it."""
        self.read(lambda: call(open_()))

    def close(self) -> None:
        """Close the session."""
        self._closed = True


class FolderSession(Session):
    """A session in a folder.

    `names` are tenant and database of new clients, or None if the caller owns the client.
    """

    folder: Folder

    def __init__(
        self, folder: Folder, names: dict[str, str] | None, client: ClientAPI | None = None
    ) -> None:
        super().__init__(client or folder.client(names or {}))
        self.folder, self._names = folder, names
        self.writing, self.epoch = folder.writing, folder.generation
        if names is not None:
            self.outdated = (NotFoundError, InternalError)
        self._version: int | None = None  # of what was read
        self._release: weakref.finalize[..., Any] | None = None

    @property
    def location(self) -> str:
        """The folder, as it was written first."""
        return self.folder.path

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from writing."""
        with self.folder.exclusive():
            yield

    def version(self) -> int | None:
        """Read a number that changes with what is stored."""
        return self.folder.version()

    def refresh(self) -> None:
        """Open the folder again if another process has written to it, checked once in a while."""
        super().refresh()
        if self._names is None or self._version is None:
            return
        folder = self.folder
        with folder.lock:
            if self.epoch != folder.generation:
                self._reconnect(reopen=False)
            elif folder.writers or time.monotonic() < folder.fresh_until:
                return
            elif folder.version() != self._version:
                self._reconnect(reopen=True)

    def reopen(self) -> None:
        """Open the folder again, unless the caller owns the client."""
        if self._names is None:
            super().reopen()
        else:
            self._reconnect(reopen=True)

    def _reconnect(self, *, reopen: bool) -> None:
        former, self.client = self.client, self.folder.client(self._names or {}, reopen=reopen)
        former.close()  # type: ignore[attr-defined]
        self.epoch = self.folder.generation
        self.folder.forget_former()

    def acquire_writer(self) -> None:
        """Make this the process that writes, after reading what another one has written."""
        self.refresh()  # the folder may be another one now
        if id(self) in self.folder.writers:
            return
        first = self.folder.acquire_writer(id(self))
        if self._release is None:
            self._release = weakref.finalize(self, self.folder.release_writer, id(self))
        if first and self._names is not None and self.version() != self._version:
            self._reconnect(reopen=True)

    def find(self, name: str) -> Collection | None:
        """Open a collection and read its index from the disk."""
        found = super().find(name)
        self._version = self.folder.load(found) if found else None
        return found

    def read(self, call: Callable[[], T]) -> T:
        """Call Chroma, and again if another process has just written or compacted."""
        try:
            return super().read(call)
        except InternalError as error:
            raise self.folder.error(error) from error

    def _call(self, call: Callable[[], T]) -> T:
        return call()

    def write(
        self, open_: Callable[[], Collection], records: int, call: Callable[[Collection], object]
    ) -> None:
        """Call a collection to write some records to it, recoverably."""
        found = self.read(open_)
        with self.folder.write(found, records):
            call(found)

    def close(self) -> None:
        """Free Chroma's memory and files, and let other processes write."""
        if self._closed or self._process != os.getpid():
            return
        super().close()
        if self._release:
            self._release()
        if self._names is not None:
            self.client.close()  # type: ignore[attr-defined]


def connect(folder: str | os.PathLike[str] | None, client: Any, given: dict[str, Any]) -> Session:
    """Connect to the Chroma where a caller has the data: a folder, a client, or a server."""
    if client is not None:
        return _session_of(client)
    names: dict[str, str] = {key: str(given[key]) for key in ("tenant", "database") if key in given}
    try:
        if given.keys() & {"client_settings", "host", "chroma_cloud_api_key"}:
            return _session_of(_client(folder, given, names))
        if folder is not None:
            return FolderSession(folder_of(folder), names)
        return Session(start(None, names))
    except NotFoundError as error:
        named = " ".join(f"{key} {value!r}" for key, value in names.items())
        msg = (
            f"Chroma does not have the {named}: {error}. "
            "Create it with chromadb.AdminClient, or leave it out."
        )
        raise ValueError(msg) from error


def _client(
    folder: str | os.PathLike[str] | None, given: dict[str, Any], names: dict[str, str]
) -> ClientAPI:
    """Make a client with settings of the caller's, or of a server."""
    settings = given.get("client_settings") or Settings(anonymized_telemetry=False)
    if (key := given.get("chroma_cloud_api_key")) is not None:
        options: Any = {**names, "api_key": key, "settings": settings}
        return retried(lambda: chromadb.CloudClient(**options))
    if given.get("host") is not None:
        options = {k: given[k] for k in ("host", "port", "ssl", "headers") if k in given}
        try:
            return chromadb.HttpClient(settings=settings, **{**options, **names})
        except ValueError as error:
            if "Could not connect" not in str(error):
                raise
            msg = (
                f"The Chroma server at {given['host']} does not answer. "
                "Start it, or correct host and port."
            )
            raise ConnectionError(msg) from error
    check_process()
    if folder is not None:
        return chromadb.PersistentClient(os.fspath(folder), settings, **names)
    return chromadb.Client(settings, **names)


def _session_of(client: Any) -> Session:
    """Begin a session with a client of the caller's."""
    if not isinstance(client, ClientAPI):
        msg = (
            f"client is {type(client).__name__}. Pass a synchronous client of Chroma: "
            "chromadb.HttpClient(...), PersistentClient(...) or EphemeralClient()."
        )
        raise TypeError(msg)
    settings = client.get_settings()
    if "Rust" in settings.chroma_api_impl:
        check_process()
    if settings.is_persistent:
        return FolderSession(folder_of(settings.persist_directory), None, client)
    return Session(client)
