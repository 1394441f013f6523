"""A folder of a local Chroma: one writing process, any number that read, and recovery after a kill.

Chroma persists a vector index in place, once in a thousand records. A process that is killed
meanwhile, or a full disk, leaves files that crash whoever opens them. So what cannot be repaired is
backed up before, and restored by the next process that opens the folder. The rest of the data is
in SQLite, and safe.
"""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
import struct
import threading
import time
import uuid
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import chromadb
from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.config import Settings
from chromadb.errors import InternalError
from filelock import FileLock, Timeout

from langchain_bge_dense._engine.process import at_fork, forkable_lock
from langchain_bge_dense.chroma import hnsw
from langchain_bge_dense.errors import FolderBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

_BACKUP = ".backup"
_MEMORY = "ephemeral"  # Chroma's name of what it keeps in memory
_STALE_SECONDS = 1.0  # how old what a process reads may be, while another one writes
_COLLECTING_SECONDS = 10.0  # between two collections of what is no longer used
_REOPENING_SHARE = 0.2  # of the time that a process spends on opening the folder again

_folders: dict[str, Folder] = {}
_folders_lock = forkable_lock()


class _Process:
    """Chroma's library in this process."""

    started = False
    parent: int | None = None
    """Process that forked this one after it had started the library."""
    inherited: ClassVar[list[object]] = []
    """Systems of the parent, which a child can neither use nor stop."""


_SEGMENT = """
    SELECT s.id, coalesce(m.seq_id, 0), (
        SELECT count(*) FROM embeddings_queue AS q
        WHERE q.topic LIKE '%' || s.collection AND q.seq_id > coalesce(m.seq_id, 0))
    FROM segments AS s LEFT JOIN max_seq_id AS m ON m.segment_id = s.id
    WHERE s.scope = 'VECTOR' AND s.collection = ?
"""
_PERSISTED = """
    SELECT coalesce(m.seq_id, 0)
    FROM segments AS s LEFT JOIN max_seq_id AS m ON m.segment_id = s.id
    WHERE s.id = ?
"""
_TEXTS = """
    SELECT count(*) FROM embeddings AS e JOIN segments AS s ON e.segment_id = s.id
    WHERE s.scope = 'METADATA' AND s.collection = ?
"""
# Deletes only mark words in an FTS5 index: https://sqlite.org/fts5.html#the_optimize_command
_FORGET_WORDS = """
    INSERT INTO embedding_fulltext_search(embedding_fulltext_search) VALUES ('optimize')
"""


class Segment(NamedTuple):
    """A collection's vector index.

    Attributes:
        name: Of its folder.
        persisted: Number of the last record in its files.
        pending: How many records they lack.
    """

    name: str
    persisted: int
    pending: int


class Folder:
    """A folder of Chroma in this process.

    `real` is its path without links, `path` as this process wrote it first: Chroma would open
    another spelling a second time, and two Chromas on one folder destroy its index.
    """

    def __init__(self, real: str, path: str) -> None:
        self.real, self.path = Path(real), path
        self.writing = threading.RLock()  # taken before the others
        self.lock = threading.RLock()  # taken before the access lock, a file
        self.generation = 0
        self._database_id: tuple[int, int] | None = None
        self.fresh_until = self._collect_after = 0.0
        self.writers: set[int] = set()
        self._writer_lock = FileLock(self.real / "indexing.lock", thread_local=False)
        self._access_lock = FileLock(
            self.real / "access.lock", thread_local=False, poll_interval=0.01
        )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep everybody else from writing and from loading an index."""
        with self.lock, self.named_errors(), self._access_lock:
            yield

    def client(self, names: dict[str, str], *, reopen: bool = False) -> ClientAPI:
        """Make a client of this process's Chroma, which is started after recovery, or again."""
        systems = _systems()
        with self.named_errors():
            self.real.mkdir(parents=True, exist_ok=True)
        with self.exclusive():
            if reopen or self._is_another():
                systems.pop(self.path, None)
                self.generation += 1
            if self.path not in systems:
                self._recover()
            client = start(self.path, names)
            self._database_id = self._identify()
            return client

    def _identify(self) -> tuple[int, int] | None:
        """Read device and inode of Chroma's database, if it exists."""
        try:
            found = self._database_file.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _is_another(self) -> bool:
        """Find out whether the folder was removed, emptied or replaced since it was opened."""
        found = self._identify()
        if found is not None and self._database_id in {None, found}:
            return False
        self.writers.clear()  # their lock was of a file that is gone
        self._writer_lock.release(force=True)
        return True

    def forget_former(self) -> None:
        """Free what was open before: a Chroma is a circle of objects around a whole index.

        Python finds it some day, and takes a part of a second to look for it.
        """
        if time.monotonic() >= self._collect_after:
            gc.collect()
            self._collect_after = time.monotonic() + _COLLECTING_SECONDS

    def load(self, collection: Collection) -> int:
        """Let Chroma read a collection's index, if it is whole, at a version of the folder."""
        start = time.monotonic()
        with self.exclusive():
            self._check(collection)
            with self._backed_up(collection, 0, loaded=False):
                collection.get(limit=1, include=["embeddings"])
            version = self.version()
        end = time.monotonic()
        self.fresh_until = end + max(_STALE_SECONDS, (end - start) / _REOPENING_SHARE)
        return version

    def version(self) -> int:
        """Read a number that every commit to Chroma's SQLite changes."""
        try:
            with self._database_file.open("rb") as file:
                file.seek(24)
                [version] = struct.unpack(">I", file.read(4))
        except FileNotFoundError as error:
            raise self.error(error) from error
        return int(version)

    def acquire_writer(self, writer: int) -> bool:
        """Make this process the only writer, and tell whether it just became one."""
        with self.lock, self.named_errors():
            first = not self.writers
            if first:
                try:
                    self._writer_lock.acquire(blocking=False)
                except Timeout as error:
                    msg = (
                        f"Another process has indexed into {self.path!r} and still runs; a second "
                        "one would destroy Chroma's index. Wait until it ends or closes its store, "
                        "or let both use a Chroma server."
                    )
                    raise FolderBusyError(msg) from error
            self.writers.add(writer)
            return first

    def release_writer(self, writer: int) -> None:
        """Let other processes write, if this was the last writer of this one."""
        with self.lock:
            self.writers.discard(writer)
            if not self.writers:
                self._writer_lock.release()

    @contextmanager
    def write(self, collection: Collection, records: int) -> Iterator[None]:
        """Keep a collection recoverable, and other processes from loading it, during one call."""
        with self.exclusive(), self._backed_up(collection, records, loaded=True):
            yield

    def flush(self) -> None:
        """Flush what Chroma has written to files to the disk."""
        for file in (*self.real.glob("*.sqlite3"), *self.real.glob("*/*.*")):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def vacuum(self) -> None:
        """Free the space of deleted rows and collections."""
        with self.exclusive(), self._database() as database:
            database.execute(_FORGET_WORDS)
            database.execute("VACUUM")
            known = {name for [name] in database.execute("SELECT id FROM segments")}
            for index in self.real.glob(f"*/{hnsw.HEADER}"):
                if index.parent.name in known:
                    hnsw.trim(index.parent)
                else:
                    shutil.rmtree(index.parent)

    def size(self) -> int:
        """Count the bytes of all files."""
        return sum(file.stat().st_size for file in self.real.rglob("*") if file.is_file())

    @contextmanager
    def _backed_up(self, collection: Collection, records: int, *, loaded: bool) -> Iterator[None]:
        """Back up the index while a call may make Chroma persist it."""
        settings = collection.configuration_json.get("hnsw") or {}
        segment = self._segment(collection)
        if segment is None:
            yield
            return
        index = self.real / segment.name
        if segment.pending + records < settings.get("sync_threshold", 1_000):
            yield
        else:
            backup = self.real / f"{segment.name}.{segment.persisted}{_BACKUP}"
            if loaded:
                collection.get(limit=1, include=["embeddings"])  # in case Chroma has let go of it
            if not backup.exists():  # otherwise the index was persisted in part, and in vain
                hnsw.back_up(index, backup, loaded=loaded)
            yield
            hnsw.drop_backup(index, backup)  # after an error it stays, for the next process
        if not segment.persisted:
            hnsw.trim(index)  # it may have been made just now

    def _recover(self) -> None:
        """Restore indexes whose persisting was cut short."""
        if not any(self.real.glob(f"*{_BACKUP}")):
            return
        try:
            with self._writer_lock.acquire(blocking=False):
                for backup in self.real.glob(f"*{_BACKUP}"):
                    self._restore(backup)
        except Timeout as error:
            msg = (
                f"The process that indexes into {self.path!r} could not write Chroma's index to "
                "its end. Wait until it has ended, and open the collection again."
            )
            raise OSError(msg) from error

    def _restore(self, backup: Path) -> None:
        name, persisted, _ = backup.name.split(".")
        with self._database() as database:
            found = database.execute(_PERSISTED, (name,)).fetchone()
        if found is not None and found[0] == int(persisted):
            hnsw.restore(self.real / name, backup)
        else:  # Chroma had come to its end
            shutil.rmtree(backup)

    def _check(self, collection: Collection) -> None:
        segment = self._segment(collection)
        if segment is None or not segment.persisted:
            return
        if any(self.real.glob(f"{segment.name}.*{_BACKUP}")):
            return  # this process failed to persist it, and has it in memory
        index = self.real / segment.name
        damage = hnsw.damage(index)
        if damage:
            with self._database() as database:
                [texts] = database.execute(_TEXTS, (str(collection.id),)).fetchone()
            msg = (
                f"The vector index of collection {collection.name!r} is damaged: {damage} in "
                f"{os.fspath(index)!r}. Its {texts:,} texts and their metadata are "
                "whole in chroma.sqlite3; their vectors have to be computed again: "
                "delete the collection with a client of Chroma, and index its documents again."
            )
            raise OSError(msg)

    def _segment(self, collection: Collection) -> Segment | None:
        with self._database() as database:
            found = database.execute(_SEGMENT, (str(collection.id),)).fetchone()
        return found and Segment(*found)

    @property
    def _database_file(self) -> Path:
        return self.real / "chroma.sqlite3"

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        uri = f"{self._database_file.as_uri()}?mode=rw"
        with closing(
            sqlite3.connect(uri, uri=True, timeout=60.0, isolation_level=None)
        ) as database:
            yield database

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Raise errors of Chroma and of files as `OSError`s that say what to do."""
        try:
            yield
        except (InternalError, sqlite3.Error) as error:
            raise self.error(error) from error
        except OSError as error:
            # One of these already, or of a model that is asked over a network.
            if error.errno is None or isinstance(error, ConnectionError):
                raise
            raise self.error(error) from error

    def has_database(self) -> bool:
        """Tell whether the folder holds a Chroma database."""
        return self._database_file.exists()

    def error(self, reason: Exception) -> OSError:
        """Make the error for a folder that could not be read or written to."""
        text = str(reason)
        if any(word in text for word in ("readonly", "ead-only", "ermission", "ot a directory")):
            return PermissionError(
                f"{self.path!r} may not be written to: {reason}. Give this process the right to "
                "write to the folder and to all files in it, or take another folder."
            )
        if not self.has_database():
            return FileNotFoundError(
                f"{self.path!r} holds no chroma.sqlite3 any more: {reason}. The folder was removed "
                "or emptied while it was open. Open the collection again and index its documents."
            )
        free = shutil.disk_usage(self.real).free / 2**20
        return OSError(
            f"Could not read or write {self.path!r}, where {free:,.1f} MiB are free: {reason}. "
            "Make room if that is little, and run this again in a new process; "
            "what is stored stays."
        )


def folder_of(path: str | os.PathLike[str]) -> Folder:
    """Find the one `Folder` of this process for a path, however it is spelled."""
    path = str(Path(path).expanduser())
    real = os.path.realpath(path)
    with _folders_lock:
        if real not in _folders:
            if any(folder.path == path for folder in _folders.values()):
                path = real  # a relative path, after a change of directory
            running = (at for at in _systems() if Path(at).is_absolute())
            path = next((at for at in running if os.path.realpath(at) == real), path)
            _folders[real] = Folder(real, path)
        return _folders[real]


def require_database(folder: str | os.PathLike[str] | None) -> None:
    """Check that a folder, if it is one, has a Chroma, which would be made otherwise."""
    if folder is not None and not folder_of(folder).has_database():
        msg = f"There is no Chroma in {os.fspath(folder)!r}. Correct the folder."
        raise FileNotFoundError(msg)


def _systems() -> dict[str, Any]:
    """Look up the Chromas that run in this process, by path."""
    return SharedSystemClient._identifier_to_system  # noqa: SLF001 - no public way


def start(path: str | None, names: dict[str, str]) -> ClientAPI:
    """Make a client of the Chroma in this process, with the settings of the one that runs.

    Without a path it is in memory, and without names in a database that nobody else has.
    """
    check_process()
    systems = _systems()
    running = systems.get(path or _MEMORY)
    settings = running.settings if running else Settings(anonymized_telemetry=False)
    _Process.started = True
    try:
        if path is not None:
            client = chromadb.PersistentClient(path, settings, **names)
        elif names:
            client = chromadb.EphemeralClient(settings, **names)
        else:
            client = chromadb.EphemeralClient(settings)
            names = {"database": uuid.uuid4().hex}
            chromadb.AdminClient(settings).create_database(names["database"])
            client.set_database(names["database"])
    finally:
        if not running and (system := systems.get(path or _MEMORY)):
            # Chroma gives one place to clients of equal settings alone, so that plain ones made
            # later would fail. It read this setting when it started.
            system.settings.anonymized_telemetry = Settings().anonymized_telemetry
    return client


def check_process() -> None:
    """Check that Chroma's library can run here: in a forked child it would wait for ever."""
    if _Process.parent is not None:
        msg = (
            f"Chroma was used by process {_Process.parent} and cannot be used in its forked child "
            f"{os.getpid()}, where its threads are gone. Start the child with the method 'spawn', "
            "or let both use a Chroma server. Embeddings alone work in the child."
        )
        raise RuntimeError(msg)


def _forget_parent() -> None:
    """Keep a forked child from using or stopping its parent's Chroma."""
    systems = _systems()
    local = [name for name, system in systems.items() if "Rust" in system.settings.chroma_api_impl]
    if _Process.started or local:
        _Process.parent = os.getppid()
    _Process.inherited.extend(systems.pop(name) for name in local)
    _Process.inherited.extend(_folders.values())
    _folders.clear()
    if _Process.inherited:
        gc.freeze()  # the end of a garbage client of the parent's would wait for its threads


at_fork(after_in_child=_forget_parent)
