"""A folder of a local Chroma: one writing process, any number that read, and recovery after a kill.

Chroma persists a vector index in place, once in a thousand records. A process that is killed
meanwhile, or a full disk, leaves files that crash whoever opens them. So what cannot be repaired is
backed up before, and restored by the next process that opens the folder. The rest of Chroma's data
is in SQLite, and safe. A process reads an index once: it opens the folder again, underneath, when
another one has written since.
"""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
import struct
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.errors import InternalError
from filelock import FileLock, Timeout

from langchain_bge_dense._engine.locks import forkable_lock
from langchain_bge_dense.chroma import hnsw
from langchain_bge_dense.chroma.collection import local_client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

_BACKUP = ".backup"
_STALE_SECONDS = 1.0  # how old what a process reads may be, while another one writes
_REOPENING_SHARE = 0.2  # of the time that a process spends on opening the folder again

_folders: dict[str, Folder] = {}
_folders_lock = forkable_lock()
_inherited: list[
    object
] = []  # systems of the parent process: a child can neither use nor stop them

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

    Args:
        real: Its path without links.
        path: Its path as this process wrote it first. Chroma would open another spelling a second
            time, and two Chromas on one folder destroy its index.
    """

    def __init__(self, real: str, path: str) -> None:
        self.real, self.path = Path(real), path
        self.lock = threading.RLock()
        self.writing = threading.RLock()
        self.generation = 0
        self._stale_until = 0.0
        self._writers: set[int] = set()
        self._writer_lock = FileLock(self.real / "indexing.lock", thread_local=False)
        self._access_lock = FileLock(
            self.real / "access.lock", thread_local=False, poll_interval=0.01
        )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Neither writes nor loading of an index by anybody else."""
        with self.lock, self._access_lock, self.named_errors():
            yield

    def client(self, names: dict[str, str], *, reopen: bool = False) -> ClientAPI:
        """A client of this process's Chroma, which is started after recovery if need be.

        Args:
            names: `tenant` and `database`.
            reopen: Start a new one in the place of the one that runs.
        """
        self.real.mkdir(parents=True, exist_ok=True)
        systems = SharedSystemClient._identifier_to_system  # noqa: SLF001 - no public way
        with self.exclusive():
            if reopen:
                systems.pop(self.path, None)
                self.generation += 1
            if self.path not in systems:
                self._recover()
            return local_client(self.path, **names)

    def load(self, collection: Collection) -> int:
        """Let Chroma read a collection's index.

        Returns:
            The version of the folder that was read.

        Raises:
            OSError: The index is damaged; the error says what is left.
        """
        start = time.monotonic()
        with self.exclusive():
            self._check(collection)
            with self._backed_up(collection, 0, loaded=False):
                collection.get(limit=1, include=["embeddings"])
            version = self.version()
        end = time.monotonic()
        self._stale_until = end + max(_STALE_SECONDS, (end - start) / _REOPENING_SHARE)
        return version

    def version(self) -> int:
        """A number that every commit to Chroma's SQLite changes."""
        try:
            with (self.real / "chroma.sqlite3").open("rb") as file:
                file.seek(24)
                [version] = struct.unpack(">I", file.read(4))
        except FileNotFoundError as error:
            raise self.error(error) from error
        return int(version)

    def is_stale(self, version: int) -> bool:
        """Whether another process has written since a version, and it is time to read that."""
        if self._writers or time.monotonic() < self._stale_until:
            return False
        return self.version() != version

    def acquire_writer(self, writer: int) -> bool:
        """Make this process the only one that writes, until its last writer is released.

        Returns:
            Whether this process was not the one before.

        Raises:
            RuntimeError: Another process writes.
        """
        with self.lock, self.named_errors():
            first = not self._writers
            if first:
                try:
                    self._writer_lock.acquire(blocking=False)
                except Timeout as error:
                    msg = (
                        f"Another process has indexed into {self.path!r} and still runs; a second "
                        "one would destroy Chroma's index. Wait until it ends or closes its store, "
                        "or let both use a Chroma server."
                    )
                    raise RuntimeError(msg) from error
            self._writers.add(writer)
            return first

    def release_writer(self, writer: int) -> None:
        """Let other processes write, if this was the last writer of this one."""
        with self.lock:
            self._writers.discard(writer)
            if not self._writers:
                self._writer_lock.release()

    @contextmanager
    def write(self, collection: Collection, records: int) -> Iterator[None]:
        """Keep a collection recoverable, and other processes from loading it, during one call.

        Args:
            collection: What is written to.
            records: How many.

        Raises:
            OSError: The folder could not be written to.
        """
        with self.exclusive(), self._backed_up(collection, records, loaded=True):
            yield

    def flush(self) -> None:
        """Have the system write to the disk what Chroma has written to files."""
        for file in (self.real / "chroma.sqlite3", *self.real.glob("*/*.*")):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def vacuum(self) -> None:
        """Give back the space of what was deleted: rows, and folders of deleted collections."""
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
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.real.rglob("*") if file.is_file())

    @contextmanager
    def _backed_up(self, collection: Collection, records: int, *, loaded: bool) -> Iterator[None]:
        """A backup of the index while a call may make Chroma persist it."""
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
        """Restore indexes that were not persisted to their end."""
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

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        uri = f"{(self.real / 'chroma.sqlite3').as_uri()}?mode=rw"
        with closing(
            sqlite3.connect(uri, uri=True, timeout=60.0, isolation_level=None)
        ) as database:
            yield database

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Errors of Chroma and of files as `OSError`s that say what to do."""
        try:
            yield
        except (InternalError, sqlite3.Error, PermissionError) as error:
            raise self.error(error) from error

    def is_there(self) -> bool:
        """Whether Chroma's database is."""
        return (self.real / "chroma.sqlite3").exists()

    def error(self, reason: Exception) -> OSError:
        """The error for a folder that could not be read or written to."""
        if not self.is_there():
            return FileNotFoundError(
                f"{self.path!r} holds no chroma.sqlite3 any more: {reason}. The folder was removed "
                "or emptied while it was open. Open the collection again and index its documents."
            )
        if "readonly" in str(reason) or "ead-only" in str(reason) or "ermission" in str(reason):
            return PermissionError(
                f"{self.path!r} may not be written to: {reason}. Give this process the right to "
                "write to the folder and to all files in it."
            )
        free = shutil.disk_usage(self.real).free / 2**20
        return OSError(
            f"Could not read or write {self.path!r}, where {free:,.1f} MiB are free: {reason}. "
            "Make room if that is little, and run this again in a new process; "
            "what is stored stays."
        )


def folder_of(path: str | os.PathLike[str]) -> Folder:
    """The one `Folder` of this process for a path, however it is spelled."""
    path = str(Path(path).expanduser())
    real = os.path.realpath(path)
    with _folders_lock:
        if real not in _folders:
            if any(folder.path == path for folder in _folders.values()):
                path = real  # a relative path, after a change of directory
            _folders[real] = Folder(real, path)
        return _folders[real]


def _forget_parent() -> None:
    """In a forked child, whose threads of Chroma are gone: let it start Chroma anew."""
    systems = SharedSystemClient._identifier_to_system  # noqa: SLF001 - no public way
    local = [name for name, system in systems.items() if "Rust" in system.settings.chroma_api_impl]
    _inherited.extend(systems.pop(name) for name in local)
    _inherited.extend(_folders.values())
    _folders.clear()
    if _inherited:
        gc.freeze()  # the end of a garbage client of the parent's would wait for its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
