"""A Chroma folder: one Chroma per process, one writing process, and an index that survives a kill.

Chroma rewrites its vector index in place, once in a thousand records. A process that is killed
meanwhile, or a disk that is full, leaves files that crash whoever opens them. So a copy is kept
while that may happen, and put back where it did. The rest of Chroma's data is in SQLite, and safe.
Knows no embeddings and no documents.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chromadb.api.models.Collection import Collection

_COPY, _UNFINISHED = ".copy", ".unfinished"

_spellings: dict[str, str] = {}  # folder to the path under which this process opened it first
_locks: dict[str, FileLock] = {}  # by folder that this process writes to
_guard = threading.RLock()

# Name of a collection's vector index, the last record in its files, and how many they lack.
_INDEX = """
    SELECT s.id, coalesce(m.seq_id, 0), (
        SELECT count(*) FROM embeddings_queue AS q
        WHERE q.topic LIKE '%' || s.collection AND q.seq_id > coalesce(m.seq_id, 0))
    FROM segments AS s LEFT JOIN max_seq_id AS m ON m.segment_id = s.id
    WHERE s.scope = 'VECTOR' AND s.collection = ?
"""
_SAVED = """
    SELECT coalesce(m.seq_id, 0)
    FROM segments AS s LEFT JOIN max_seq_id AS m ON m.segment_id = s.id
    WHERE s.id = ?
"""


def enter(folder: str | os.PathLike[str]) -> str:
    """The path to open a folder under, which is mended first if a writer was killed in it.

    It is the folder's path as this process wrote it first: Chroma would open another spelling a
    second time, and two Chromas on one folder destroy its index.
    """
    real, path = os.path.realpath(folder), os.fspath(folder)
    with _guard:
        if real not in _spellings:
            _mend(Path(real))
            if path in _spellings.values():
                path = real  # a relative path, after a change of directory
        return _spellings.setdefault(real, path)


def write_alone(path: str) -> Path:
    """Make this process the only one that indexes into a folder, until it ends.

    Args:
        path: As it was opened.

    Returns:
        The folder.

    Raises:
        RuntimeError: Another process has indexed into it and still runs.
    """
    opened = {spelling: folder for folder, spelling in _spellings.items()}
    folder = opened.get(path, os.path.realpath(path))
    with _guard:
        lock = _locks.get(folder) or _lock(folder)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            msg = (
                f"Another process has indexed into {folder!r} and still runs; a second one would "
                "destroy Chroma's index. Wait until it ends, or let both use a Chroma server."
            )
            raise RuntimeError(msg) from error
        _locks[folder] = lock
    return Path(folder)


@contextmanager
def guarded(folder: Path, collection: Collection, coming: int) -> Iterator[None]:
    """Keep a copy of a collection's vector index while a call may make Chroma rewrite it.

    Args:
        folder: Of Chroma.
        collection: In it.
        coming: Records that the call writes.

    Raises:
        OSError: There is no room for the copy; nothing was written.
    """
    settings = collection.configuration_json.get("hnsw") or {}
    with _guard:
        found = _select(folder, _INDEX, str(collection.id))
        if found is None or found[2] + coming < settings.get("sync_threshold", 1_000):
            yield
            return
        name, saved, _ = found
        _copy(folder / name, saved)
        yield
        for copy in folder.glob(f"{name}.*{_COPY}"):
            shutil.rmtree(copy)  # after an error it stays, and the next process mends the folder


def _lock(folder: str | Path) -> FileLock:
    return FileLock(Path(folder, "indexing.lock"), thread_local=False)


def _select(folder: Path, query: str, value: str) -> Any:
    """First row of a query to Chroma's SQLite."""
    uri = f"{(folder / 'chroma.sqlite3').as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=60.0)) as database:
        return database.execute(query, (value,)).fetchone()


def _copy(index: Path, saved: int) -> None:
    copy = index.with_name(f"{index.name}.{saved}{_COPY}")
    if copy.exists():
        return  # the files have been rewritten since, and in vain
    unfinished = copy.with_suffix(_UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if index.exists():
            shutil.copytree(index, unfinished)
        else:
            unfinished.mkdir()
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise no_room(index.parent, reason) from error
    unfinished.rename(copy)


def no_room(folder: str | os.PathLike[str], reason: object) -> OSError:
    """The error for a folder that could not be written to."""
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        f"Could not write to {os.fspath(folder)!r}, where {free:,.1f} MiB are free: {reason}. "
        "Make room if that is little, and run this again in a new process; what is stored stays."
    )


def _mend(folder: Path) -> None:
    """Put back copies of vector indexes whose rewriting did not end."""
    if not any(folder.glob(f"*{_COPY}")):
        return
    try:
        with _lock(folder).acquire(blocking=False):
            for copy in folder.glob(f"*{_COPY}"):
                _put_back(copy)
    except Timeout:
        pass  # a writer is at work


def _put_back(copy: Path) -> None:
    name, saved, _ = copy.name.split(".")
    found = _select(copy.parent, _SAVED, name)
    if found is not None and found[0] == int(saved):  # otherwise the rewriting ended
        shutil.rmtree(copy.with_name(name), ignore_errors=True)
        if any(copy.iterdir()):
            copy.rename(copy.with_name(name))
    shutil.rmtree(copy, ignore_errors=True)
