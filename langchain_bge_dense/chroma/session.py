"""The one door to Chroma: a guarded collection, over a session in memory, a folder or a server.

Each call is guarded once: made again after another process has written or compacted, and while a
server does not answer; ids and bodies in parts that Chroma takes; errors that say what to do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import chromadb
import httpx
import numpy as np
from chromadb.api import ClientAPI
from chromadb.config import Settings
from chromadb.errors import InternalError, NotFoundError, RateLimitError
from langchain_core.utils.iter import batch_iterate
from tenacity import (
    RetryError,
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense.chroma.filters import exact
from langchain_bge_dense.chroma.folder import check_process, folder_of, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from chromadb.api.models.Collection import Collection

    from langchain_bge_dense.chroma.folder import Folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

COPY = ".compact"
"""End of the name of the copy that compaction writes."""
COMPLETE = "complete_copy"
"""Key in its metadata: whether it holds all."""
_LONGEST_NAME = 512
_ATTEMPTS = 10  # at reading beside a process that writes
_IDS = 10_000  # of one request: SQLite takes 32,766 values, those of a filter among them
_BODY = 36 << 20  # bytes of a request to a server, which takes 40 MiB
_NUMBER = 24  # bytes of a number in it

_ANSWER = ("metadatas", "documents", "distances")

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


class Session:
    """A client of a Chroma in memory or on a server; what it holds is of one epoch.

    Args:
        client: The client.
    """

    folder: Folder | None = None

    def __init__(self, client: ClientAPI) -> None:
        self.client = client
        self.epoch = 0
        # Held while passages and their signals are written, and during a compaction.
        self.writing = threading.RLock()
        self._process = os.getpid()
        self._closed = False

    @functools.cached_property
    def batch_size(self) -> int:
        """Records that Chroma takes at once."""
        return retried(self.client.get_max_batch_size)

    @functools.cached_property
    def body(self) -> int | None:
        """Bytes that Chroma takes at once; None where there is no limit."""
        api = self.client.get_settings().chroma_api_impl
        return None if "Rust" in api or "Segment" in api else _BODY

    @property
    def place(self) -> str:
        """Folder or URL of the Chroma; empty for one in memory."""
        settings = self.client.get_settings()
        host, port = settings.chroma_server_host, settings.chroma_server_http_port
        scheme = "https" if settings.chroma_server_ssl_enabled else "http"
        return f"{scheme}://{host}:{port}" if host else ""

    def check(self) -> None:
        """Check that the session is open, and of this process."""
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

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep others from writing, where the data is in a folder."""
        yield

    def version(self) -> int | None:
        """A number that changes with what is stored; None where nothing tells."""
        return None

    def refresh(self) -> None:
        """Begin another epoch if another process has written, once in a while."""

    def reopen(self) -> None:
        """Begin another epoch: read everything again."""
        self.epoch += 1

    def acquire_writer(self) -> None:
        """Make this the process that writes, where only one may."""
        self.check()

    def find(self, name: str) -> Collection | None:
        """A collection as Chroma has it; None where there is none."""
        return self._find(name) or self._complete_copy(name)

    def _find(self, name: str) -> Collection | None:
        try:
            return retried(lambda: self.client.get_collection(name, embedding_function=None))
        except NotFoundError:
            return None

    def _complete_copy(self, name: str) -> Collection | None:
        """The copy that a killed compaction had yet to put in the place of a collection."""
        copy = self._find(f"{name}{COPY}") if len(name) + len(COPY) <= _LONGEST_NAME else None
        if copy is None or (copy.metadata or {}).get(COMPLETE) is not True:
            return None
        copy.modify(name=name)
        return copy

    def read(self, call: Callable[[], T]) -> T:
        """Call Chroma, and again if another process has just compacted."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return retried(call)
            except NotFoundError:  # noqa: PERF203 - what fails is rare
                self.reopen()
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
        """Let go of the client."""
        self._closed = True


class FolderSession(Session):
    """A session in a folder.

    Args:
        folder: The folder.
        names: Tenant and database, for the client to be made again; None where it is the caller's.
        client: The caller's.
    """

    folder: Folder

    def __init__(
        self, folder: Folder, names: dict[str, str] | None, client: ClientAPI | None = None
    ) -> None:
        super().__init__(client or folder.client(names or {}))
        self.folder, self._names = folder, names
        self.writing = folder.writing
        self._version: int | None = None  # of what was read
        self._generation = folder.generation
        self._release: weakref.finalize[..., Any] | None = None

    @property
    def place(self) -> str:
        """The folder, as it was written first."""
        return self.folder.path

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from writing."""
        with self.folder.exclusive():
            yield

    def version(self) -> int | None:
        """A number that changes with what is stored."""
        return self.folder.version()

    def refresh(self) -> None:
        """Open the folder again if another process has written to it, once in a while."""
        if self._names is None or self._version is None:
            return
        with self.folder.lock:
            if self._generation != self.folder.generation:
                self._reconnect(reopen=False)
            elif self.folder.is_stale(self._version):
                self._reconnect(reopen=True)

    def reopen(self) -> None:
        """Open the folder again, if the client is not the caller's."""
        if self._names is None:
            self.epoch += 1
        else:
            self._reconnect(reopen=True)

    def _reconnect(self, *, reopen: bool) -> None:
        former, self.client = self.client, self.folder.client(self._names or {}, reopen=reopen)
        former.close()  # type: ignore[attr-defined]
        self._generation = self.folder.generation
        self.epoch += 1

    def acquire_writer(self) -> None:
        """Make this the process that writes; what another one has written before is read first.

        Raises:
            FolderBusyError: Another process writes.
        """
        self.check()
        self.refresh()  # the folder may be another one now
        if self.folder.has_writer(id(self)):
            return
        first = self.folder.acquire_writer(id(self))
        if self._release is None:
            self._release = weakref.finalize(self, self.folder.release_writer, id(self))
        if first and self._names is not None and self.version() != self._version:
            self._reconnect(reopen=True)

    def find(self, name: str) -> Collection | None:
        """A collection with its index read from the disk; None where there is none."""
        try:
            found = super().find(name)
        except InternalError as error:
            raise self.folder.error(error) from error
        self._version = self.folder.load(found) if found else None
        return found

    def read(self, call: Callable[[], T]) -> T:
        """Call Chroma, and again if another process has just written or compacted."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return call()
            except NotFoundError:  # noqa: PERF203 - what fails is rare
                self.reopen()
            except InternalError:
                if self._names is None:
                    break
                self.reopen()
        with self.folder.named_errors():
            return call()

    def write(
        self, open_: Callable[[], Collection], records: int, call: Callable[[Collection], object]
    ) -> None:
        """Call a collection to write some records to it, recoverably."""
        found = open_()
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


class GuardedCollection:
    """A collection of Chroma by its name, through the session of its store.

    Args:
        session: The session.
        name: The name.
        create: Make the collection, with this configuration, when it is first written to.
    """

    def __init__(
        self, session: Session, name: str, create: Mapping[str, Any] | None = None
    ) -> None:
        self.session, self.name = session, name
        self._create = create
        self._opened: Collection | None = None
        self._epoch = -1

    def find(self) -> Collection | None:
        """The collection of this epoch; None where there is none."""
        self.session.check()
        self.session.refresh()
        if self._opened is None or self._epoch != self.session.epoch:
            with self.session.exclusive():
                self._epoch = self.session.epoch
                self._opened = self.session.find(self.name)
        return self._opened

    def open(self) -> Collection:
        """The collection of this epoch, made if it may be."""
        found = self.find()
        if found is None and self._create is not None:
            configuration: Any = self._create
            found = self._opened = self.session.client.get_or_create_collection(
                self.name, configuration=configuration, embedding_function=None
            )
        if found is None:
            msg = f"Collection {self.name!r} was deleted. Open it again by open_chroma."
            raise ValueError(msg)
        return found

    def forget(self) -> None:
        """Open the collection again when it is next used."""
        self._opened = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the collection."""
        return self.open().metadata or {}

    @property
    def configuration_json(self) -> dict[str, Any]:
        """Configuration of the collection."""
        return self.open().configuration_json

    def count(self) -> int:
        """How many records there are."""
        return self._read(lambda collection: collection.count())

    def get(
        self,
        ids: str | Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int | None = None,
        offset: int | None = None,
        **options: Any,
    ) -> Any:
        """Chroma's `get`, of any number of ids."""
        options |= {"where": exact(where), "where_document": options.get("where_document") or None}
        if ids is None or isinstance(ids, str) or len(ids) <= _IDS:
            given: Any = {**options, "ids": ids, "limit": limit, "offset": offset}
            return self._read(lambda collection: collection.get(**given))
        parts = [
            self._read(lambda collection, ids=window: collection.get(ids=ids, **options))  # type: ignore[misc]
            for window in batch_iterate(_IDS, dict.fromkeys(ids))
        ]
        first, last = offset or 0, None if limit is None else (offset or 0) + limit
        return {name: _joined([part[name] for part in parts], first, last) for name in parts[0]}

    def query(
        self,
        query_embeddings: Sequence[Any],
        n_results: int = 10,
        *,
        include: Sequence[str] = _ANSWER,
        among: Sequence[str] | None = None,
        **which: Any,
    ) -> dict[str, list[list[Any]]]:
        """Chroma's `query`, whose answers are completed to all that there is.

        `among` are the ids of all that pass the filters, if these are known: that spares Chroma
        to find them.
        """
        filters = {name: value for name, value in which.items() if value not in (None, {})}
        if "where" in filters:
            filters["where"] = exact(filters["where"])
        names = list(dict.fromkeys((*_ANSWER, *include)))
        answers = [
            self._nearest(each, n_results, names, filters, among) for each in query_embeddings
        ]
        return {
            name: [[row[name] for row in rows] for rows in answers] for name in ("ids", *include)
        }

    def _nearest(
        self,
        vector: Any,
        count: int,
        names: Sequence[str],
        filters: Mapping[str, Any],
        among: Sequence[str] | None,
    ) -> list[dict[str, Any]]:
        options: Any = {"query_embeddings": [vector], "include": names, "n_results": count}

        def query(collection: Collection) -> Any:
            if among:
                with contextlib.suppress(InternalError):  # one of them was deleted meanwhile
                    return collection.query(ids=list(among), **options)
            return collection.query(**options, **filters)

        found = self._read(query)
        rows = _with_text(_rows({name: found[name][0] for name in ("ids", *names)}))
        if len(rows) < count:
            known = {row["ids"] for row in rows}
            passing = self._passing(len(rows), filters) if among is None else among
            lacking = [each for each in passing if each not in known]
            more = [
                row
                for page in batch_iterate(_IDS, lacking)
                for row in self._compared(page, vector, names)
            ]
            rows = sorted([*rows, *more], key=lambda row: float(row["distances"]))[:count]
        return rows

    def _passing(self, found: int, filters: Mapping[str, Any]) -> Sequence[str]:
        """Ids of all that pass the filters, if these are more than were found."""
        if not filters and self.count() <= found:
            return ()
        given: Sequence[str] | None = filters.get("ids")
        if given is not None and len(given) <= found:
            return ()
        ids: list[str] = self.get(include=[], **filters)["ids"]
        return ids

    def _compared(
        self, ids: Sequence[str], vector: Any, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Records that the graph of the index has no way to, with their distances."""
        kept = [name for name in names if name not in {"distances", "embeddings"}]
        found = self.get(ids, include=[*kept, "embeddings"])
        if not found["ids"]:
            return []
        vectors = np.asarray(found["embeddings"], np.float32)  # (N, D)
        distances = (1 - cosines(vectors, np.asarray(vector, np.float32))).tolist()
        columns = {name: found[name] for name in ("ids", "embeddings", *kept)}
        return _with_text(_rows({**columns, "distances": distances}))

    def upsert(
        self,
        *,
        ids: Sequence[str],
        embeddings: Any,
        metadatas: Sequence[Mapping[str, Any] | None],
        documents: Sequence[str] | None = None,
    ) -> None:
        """Chroma's `upsert`, in parts that it takes."""
        session, width = self.session, _NUMBER * len(embeddings[0]) if len(ids) else 0

        def size(number: int) -> int:
            record = [ids[number], documents and documents[number], metadatas[number]]
            return width + len(json.dumps(record, ensure_ascii=False).encode())

        numbers = range(len(ids))
        if session.body is None:
            parts: Iterable[Sequence[int]] = batch_iterate(session.batch_size, numbers)
        else:
            for number in numbers:
                _check_body(ids[number], size(number), session.body)
            parts = windows(numbers, size, session.body, session.batch_size)
        for part in parts:
            columns: Any = {
                "ids": [ids[number] for number in part],
                "embeddings": [embeddings[number] for number in part],
                "metadatas": [metadatas[number] for number in part],
                "documents": documents and [documents[number] for number in part],
            }
            session.write(self.open, len(part), lambda c, columns=columns: c.upsert(**columns))  # type: ignore[misc]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete any number of records."""
        for part in batch_iterate(min(self.session.batch_size, _IDS), ids):
            self.session.write(self.open, len(part), lambda c, part=part: c.delete(ids=part))  # type: ignore[misc]

    def modify(self, metadata: Mapping[str, Any]) -> None:
        """Add to the metadata of the collection."""
        # Chroma takes no hnsw:space here; the configuration holds the space.
        stored = {k: v for k, v in self.metadata.items() if k != "hnsw:space"}
        if stored != {**stored, **metadata}:
            self._read(lambda collection: collection.modify(metadata={**stored, **metadata}))

    def search(self, searches: Any) -> Any:
        """Chroma Cloud's `search`."""
        return self._read(lambda collection: collection.search(searches))

    def _read(self, call: Callable[[Collection], T]) -> T:
        return self.session.read(lambda: call(self.open()))


def connect(folder: str | os.PathLike[str] | None, client: Any, place: dict[str, Any]) -> Session:
    """A session with the Chroma where a caller has the data.

    Args:
        folder: A folder.
        client: A client of the caller's.
        place: What `langchain_chroma.Chroma` takes of `host`, `port`, `ssl`, `headers`, `tenant`,
            `database`, `client_settings` and `chroma_cloud_api_key`.

    Raises:
        TypeError: The client is none of Chroma's, or an asynchronous one.
        ValueError: There is no such tenant or database.
        ConnectionError: The server does not answer.
    """
    if client is not None:
        return _session_of(client)
    names: dict[str, str] = {key: str(place[key]) for key in ("tenant", "database") if key in place}
    try:
        if place.keys() & {"client_settings", "host", "chroma_cloud_api_key"}:
            return _session_of(_client(folder, place, names))
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
    folder: str | os.PathLike[str] | None, place: dict[str, Any], names: dict[str, str]
) -> ClientAPI:
    """A client with settings of the caller's, or of a server."""
    settings = place.get("client_settings") or Settings(anonymized_telemetry=False)
    if (key := place.get("chroma_cloud_api_key")) is not None:
        options: Any = {**names, "api_key": key, "settings": settings}
        return retried(lambda: chromadb.CloudClient(**options))
    if place.get("host") is not None:
        options = {k: place[k] for k in ("host", "port", "ssl", "headers") if k in place}
        try:
            return chromadb.HttpClient(settings=settings, **{**options, **names})
        except ValueError as error:
            if "Could not connect" not in str(error):
                raise
            msg = (
                f"The Chroma server at {place['host']} does not answer. "
                "Start it, or correct host and port."
            )
            raise ConnectionError(msg) from error
    check_process()
    if folder is not None:
        return chromadb.PersistentClient(os.fspath(folder), settings, **names)
    return chromadb.Client(settings, **names)


def _session_of(client: Any) -> Session:
    """A session with a client of the caller's."""
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


def cosines(vectors: np.ndarray[Any, Any], query: np.ndarray[Any, Any]) -> Any:
    """Cosines of `(N, D)` vectors and a `(D,)` one, `(N,)`; 0 where one has no length."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)  # (N,)
    return vectors @ query / np.maximum(norms, np.float32(1e-12))  # (N,)


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _with_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of passages; one without a text was deleted since the index was read."""
    return [row for row in rows if row["documents"] is not None]


def _joined(parts: Sequence[Any], first: int, last: int | None) -> Any:
    """A column of several answers of Chroma."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], np.ndarray):
        return np.concatenate([part for part in parts if len(part)] or parts[:1])[first:last]
    return [each for part in parts for each in part][first:last]


def _check_body(name: str, size: int, most: int) -> None:
    if size > most:
        msg = (
            f"Document {name!r} takes {size / 2**20:,.1f} MiB, and a Chroma server takes "
            f"{most / 2**20:,.0f} MiB at once. Split its text, or leave it out."
        )
        raise ValueError(msg)
