"""Signals of passages beside their dense vectors: one table by key for each store.

A row has the `max_length` that cut a passage, its lexical weights and its ColBERT codes. The table
is a SQLite database in a folder, where Chroma would keep each value twice, and a collection
elsewhere. A key names passage and text, so that a passage and its replacement have rows
of their own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sqlite3
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense.chroma.collection import GuardedCollection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.folder import Folder
    from langchain_bge_dense.chroma.session import Session

    Replace = Callable[[GuardedCollection, Callable[[GuardedCollection], None]], None]
    Written = tuple["Position", list[tuple[str, bytes | None]]]

_HASH = 16  # characters of a key behind the id
# Chroma makes a graph of whatever it stores: nobody searches this one.
_GRAPH = {"hnsw": {"space": "cosine", "max_neighbors": 2, "ef_construction": 2}}
_PAGE = 500  # rows looked up at once
_INDEX_PAGE = 4_096  # rows that an index reads at once
_LOG_PAGE = 8  # entries of a log that it reads at once
_REQUEST_ROWS, _REQUEST_BYTES = 1_000, 1 << 24  # of one request; Base64 makes bytes a third more
# Long values fill pages of SQLite's smallest useful size to the end.
_SCHEMA = """
    PRAGMA page_size = 1024;
    CREATE TABLE IF NOT EXISTS passages (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT UNIQUE NOT NULL, cut_at INTEGER, lexical BLOB, codes BLOB);
"""
# A row that is written again gets another number, by which indexes find it; what is not given
# stays. One without values says that the passage is gone.
_PUT = """
    INSERT OR REPLACE INTO passages (key, cut_at, lexical, codes) VALUES (:key, :cut_at,
        coalesce(:lexical, (SELECT lexical FROM passages WHERE key = :key)),
        coalesce(:codes, (SELECT codes FROM passages WHERE key = :key)))
"""
_DELETE = """
    INSERT OR REPLACE INTO passages (key) SELECT key FROM passages WHERE key = ?
"""
_SWEEP = "DELETE FROM passages WHERE cut_at IS NULL AND lexical IS NULL AND codes IS NULL"


def key_of(passage: str, text: str) -> str:
    """Make the key of the signals of a passage: its id, and sixty-four bits of its text.

    >>> key_of("a", "one")
    'a34f2ddaa8b7615c9'
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return passage + digest.hexdigest()


def passage_of(key: str) -> str:
    """Extract the id from a key."""
    return key[:-_HASH]


class Encoded(NamedTuple):
    """Vectors and signals of N passages, before they are stored."""

    vectors: NDArray[np.float32]  # (N, D)
    lexical: Sequence[bytes | None] | None = None
    """Packed weights of each passage."""
    codes: Sequence[bytes | None] | None = None
    """ColBERT codes of each passage."""
    cut_at: Sequence[int | None] | None = None
    """`max_length` that cut each passage, 0 for the model's own, None for a whole passage."""
    tokens: int = 0

    @property
    def truncated(self) -> int:
        """Count the passages that were cut."""
        return sum(length is not None for length in self.cut_at or ())

    def added_to(self, found: Sequence[Available]) -> Encoded:
        """Select the signals that a table lacks, with its lengths of cut vectors."""

        def lacking(column: str, values: Sequence[bytes | None] | None) -> Any:
            present = (getattr(has, column) for has in found)
            return values and [None if has else v for v, has in zip(values, present, strict=True)]

        columns = {name: lacking(name, getattr(self, name)) for name in ("lexical", "codes")}
        return self._replace(cut_at=[has.cut_at for has in found], **columns)

    def rows(self, keys: Sequence[str]) -> Iterator[Row]:
        """Make rows of the table for these passages."""
        none = [None] * len(keys)
        columns = (self.cut_at or none, self.lexical or none, self.codes or none)
        return (Row(*row) for row in zip(keys, *columns, strict=True))


class Row(NamedTuple):
    """Signals of one passage."""

    key: str
    cut_at: int | None = None
    lexical: bytes | None = None
    codes: bytes | None = None


class Available(NamedTuple):
    """Signals of a passage that are in a table."""

    cut_at: int | None = None
    lexical: bool = False
    codes: bool = False


class Position(NamedTuple):
    """Position of an index in the log of a table. Another log is read from its start."""

    log: object = None
    number: int = 0


def pack(weights: Mapping[int, float]) -> bytes:
    """Pack lexical weights into bytes: token ids, then their weights."""
    count = len(weights)
    ids = np.fromiter(weights, "<u4", count)
    return ids.tobytes() + np.fromiter(weights.values(), "<f4", count).tobytes()


def unpack(packed: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Unpack sizes `(N,)`, token ids `(M,)` and weights `(M,)` of N passages."""
    sizes = np.array([len(each) // 8 for each in packed], np.int64)
    joined = np.frombuffer(b"".join(packed), "<u4")  # ids and weights of each in turn
    part = np.repeat(np.arange(2 * len(sizes)), np.repeat(sizes, 2)) % 2  # 0: id, 1: weight
    return sizes, joined[part == 0], joined[part == 1].view("<f4")


class Signals(ABC):
    """The table of a store."""

    @classmethod
    def of(cls, session: Session, uid: str) -> Signals:
        """Make the table of the passages with this uid."""
        name = f"{uid}.signals"
        if session.folder is not None:
            return FolderSignals(session.folder, name)
        return CollectionSignals(session, name)

    def put(self, keys: Sequence[str], encoded: Encoded) -> None:
        """Write signals of passages. Absent ones stay as they are."""
        rows = {row.key: row for row in encoded.rows(keys)}
        empty = [key for key, row in rows.items() if row == Row(key)]
        unknown = set(empty).difference(self.available(empty))
        self._write([row for key, row in rows.items() if key not in unknown])

    def available(self, keys: Sequence[str]) -> dict[str, Available]:
        """Find the signals that passages have, by key."""
        rows = [row for page in batch_iterate(_PAGE, keys) for row in self._available(page)]
        return {key: found for key, found in rows if found != (None, False, False)}

    def codes(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Find the codes of those passages that have any, by key."""
        return dict(row for page in batch_iterate(_PAGE, keys) for row in self._codes(page))

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete the signals of passages."""

    @abstractmethod
    def since(self, position: Position) -> Iterator[Written]:
        """Read keys and packed weights, None if gone, written after a position, page by page."""

    @abstractmethod
    def keep_only(self, keys: Sequence[str], replace: Replace) -> None:
        """Delete the signals of all other passages, also from the files.

        `replace` replaces a collection by a new one that a function fills.
        """

    @abstractmethod
    def drop(self) -> None:
        """Delete the table."""

    @abstractmethod
    def _write(self, rows: Sequence[Row]) -> None: ...

    @abstractmethod
    def _available(self, keys: Sequence[str]) -> Iterable[tuple[str, Available]]: ...

    @abstractmethod
    def _codes(self, keys: Sequence[str]) -> Iterable[tuple[str, bytes]]: ...


class FolderSignals(Signals):
    """A SQLite database in the folder of a local Chroma."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._file = folder, folder.real / f"{name}.sqlite3"

    def delete(self, keys: Sequence[str]) -> None:
        """Delete the signals of passages."""
        if keys and self._file.exists():
            with self._database() as database:
                database.executemany(_DELETE, ((key,) for key in keys))

    def since(self, position: Position) -> Iterator[Written]:
        """Read keys and packed weights, None if gone, written after a position, page by page."""
        while self._file.exists():
            with self._database() as database:
                [version] = database.execute("PRAGMA user_version").fetchone()
                log = (self._file.stat().st_ino, version)
                number = position.number if log == position.log else 0
                rows = database.execute(
                    "SELECT key, lexical, number FROM passages WHERE number > ? "
                    "ORDER BY number LIMIT ?",
                    (number, _INDEX_PAGE),
                ).fetchall()
            if not rows and log == position.log:
                return
            position = Position(log, rows[-1][2] if rows else number)
            yield position, [row[:2] for row in rows]

    def keep_only(self, keys: Sequence[str], replace: Replace) -> None:  # noqa: ARG002
        """Delete the rows of all other passages, and the space that they took."""
        if not self._file.exists():
            return
        with self._database() as database:
            kept = set(keys)
            stored = (key for [key] in database.execute("SELECT key FROM passages").fetchall())
            gone = ((key,) for key in stored if key not in kept)
            database.executemany("DELETE FROM passages WHERE key = ?", gone)
            database.execute(_SWEEP)
            [version] = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {version + 1}")  # indexes begin anew
            database.commit()
            database.execute("VACUUM")

    def drop(self) -> None:
        """Delete the database."""
        for ending in ("", "-journal"):
            self._file.with_name(f"{self._file.name}{ending}").unlink(missing_ok=True)

    def _write(self, rows: Sequence[Row]) -> None:
        if rows:
            with self._database(create=True) as database:
                database.executemany(_PUT, [row._asdict() for row in rows])

    def _available(self, keys: Sequence[str]) -> Iterable[tuple[str, Available]]:
        found = self._select("key, cut_at, lexical IS NOT NULL, codes IS NOT NULL", keys)
        return ((key, Available(cut_at, *map(bool, rest))) for key, cut_at, *rest in found)

    def _codes(self, keys: Sequence[str]) -> Iterable[tuple[str, bytes]]:
        return (row for row in self._select("key, codes", keys) if row[1] is not None)

    def _select(self, columns: str, keys: Sequence[str]) -> list[Any]:
        if not self._file.exists():
            return []
        marks = ", ".join("?" * len(keys))
        with self._database() as database:
            query = f"SELECT {columns} FROM passages WHERE key IN ({marks})"  # noqa: S608
            return list(database.execute(query, list(keys)))

    @contextlib.contextmanager
    def _database(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Begin a transaction."""
        uri = f"{self._file.as_uri()}?mode={'rwc' if create else 'rw'}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60.0)) as database:
                if create:
                    database.executescript(_SCHEMA)
                with database:
                    yield database
        except sqlite3.Error as error:
            raise self._folder.error(error) from error


class CollectionSignals(Signals):
    """A second collection of the same database.

    Beside the rows it has a log of their keys: an entry is written in one request with the rows
    that it names, and after they are deleted. Codes have records of their own, as they are large.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._collection = GuardedCollection(session, name, create=_GRAPH)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete the signals of passages."""
        known = list(self.available(keys))
        if known:
            self._collection.delete([*known, *map(_codes_id, known)])
            _upsert(self._collection, [_entry(known)])

    def since(self, position: Position) -> Iterator[Written]:
        """Read keys and packed weights, None if gone, written after a position, page by page."""
        while (found := self._collection.find()) is not None:
            number = position.number if found.id == position.log else 0
            options: Any = {"where": {"kind": "log"}, "offset": number, "limit": _LOG_PAGE}
            entries = self._collection.get(include=["metadatas"], **options)["metadatas"]
            if self._collection.find() is not found:  # compacted meanwhile
                continue
            if not entries and found.id == position.log:
                return
            named = [key for entry in entries for key in json.loads(entry["keys"])]
            keys = list(dict.fromkeys(named))
            weights = {row.key: row.lexical for row in self._rows(keys)}
            position = Position(found.id, number + len(entries))
            yield position, [(key, weights.get(key)) for key in keys]

    def keep_only(self, keys: Sequence[str], replace: Replace) -> None:
        """Replace the collection by a copy of these rows."""
        if self._collection.find() is not None:
            replace(self._collection, lambda copy: self._copy(copy, keys))

    def _copy(self, target: GuardedCollection, keys: Sequence[str]) -> None:
        for page in batch_iterate(_PAGE, keys):
            codes = dict(self._codes(page))
            _put(target, [row._replace(codes=codes.get(row.key)) for row in self._rows(page)])

    def drop(self) -> None:
        """Delete the collection."""
        with contextlib.suppress(NotFoundError):
            self._session.client.delete_collection(self._collection.name)
        self._collection.forget()

    def _write(self, rows: Sequence[Row]) -> None:
        _put(self._collection, rows)

    def _available(self, keys: Sequence[str]) -> Iterable[tuple[str, Available]]:
        coded = set(self._get(list(map(_codes_id, keys)), include=[])["ids"])
        return (
            (row.key, Available(row.cut_at, row.lexical is not None, _codes_id(row.key) in coded))
            for row in self._rows(keys)
        )

    def _codes(self, keys: Sequence[str]) -> Iterable[tuple[str, bytes]]:
        ids = dict(zip(map(_codes_id, keys), keys, strict=True))
        found = self._get(list(ids))
        columns = zip(found["ids"], found["metadatas"], strict=True)
        return ((ids[each], base64.b64decode(entry["codes"])) for each, entry in columns)

    def _rows(self, keys: Sequence[str]) -> list[Row]:
        """Read rows without codes."""
        found = self._get(list(keys))
        columns = zip(found["ids"], found["metadatas"], strict=True)
        packed = ((key, each.get("cut_at"), each.get("lexical")) for key, each in columns)
        return [
            Row(key, cut_at, None if text is None else base64.b64decode(text))
            for key, cut_at, text in packed
        ]

    def _get(self, ids: Sequence[str], include: Sequence[str] = ("metadatas",)) -> Any:
        if not ids or self._collection.find() is None:
            return {"ids": [], "metadatas": []}
        return self._collection.get(ids, include=list(include))


def _put(collection: GuardedCollection, rows: Sequence[Row]) -> None:
    """Write rows and their log, in requests that a server takes."""
    for window in windows(rows, _size, _REQUEST_BYTES, _REQUEST_ROWS):
        records = [record for row in window for record in _records(row)]
        _upsert(collection, [*records, _entry([row.key for row in window])])


def _upsert(
    collection: GuardedCollection, records: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    ids, metadatas = zip(*records, strict=True)
    # Chroma wants vectors.
    collection.upsert(ids=ids, metadatas=metadatas, embeddings=np.ones((len(ids), 1), np.float32))


def _entry(keys: Sequence[str]) -> tuple[str, dict[str, str]]:
    return uuid.uuid4().hex, {"kind": "log", "keys": json.dumps(keys)}


def _records(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make records of a row. Chroma removes a value that is None, and keeps an absent one."""
    lexical = {} if row.lexical is None else {"lexical": base64.b64encode(row.lexical).decode()}
    yield row.key, {"kind": "row", "cut_at": row.cut_at, **lexical}
    if row.codes is not None:
        yield _codes_id(row.key), {"kind": "codes", "codes": base64.b64encode(row.codes).decode()}


def _codes_id(key: str) -> str:
    return f"{key}.codes"


def _size(row: Row) -> int:
    return len(row.key) + len(row.lexical or b"") + len(row.codes or b"")
