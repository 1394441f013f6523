"""Codes of ColBERT vectors of the passages of a collection, read by the passage.

In a folder they are a database of their own beside Chroma's: Chroma would keep each value twice,
once in an index of values. In memory and on a server they are a second collection.
"""

from __future__ import annotations

import base64
import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense.chroma.companions import (
    CollectionCompanion,
    Companion,
    no_vectors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from chromadb import Collection

    from langchain_bge_dense.chroma.companions import Encoded, Replace
    from langchain_bge_dense.chroma.connection import Connection

_PAGE = 500  # passages looked up at once
_REQUEST_BYTES = 1 << 24  # of codes; a server takes 40 MiB, where Base64 has made them a third more
# Long values fill pages of SQLite's smallest useful size to the end.
_SCHEMA = """
    PRAGMA page_size = 1024;
    CREATE TABLE IF NOT EXISTS passages (key TEXT PRIMARY KEY, codes BLOB);
"""


class ColbertCodes(Companion):
    """Codes of passages."""

    kind = "colbert"

    @staticmethod
    def of(connection: Connection, uid: str) -> ColbertCodes:
        """The codes of a store's passages, wherever its Chroma is."""
        return (CodesInFolder if connection.folder else CodesInCollection)(connection, uid)

    def present(self, keys: Sequence[str]) -> set[str]:
        """Those of the passages that have codes."""
        return set(self._read(keys, codes=False))

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Codes of those passages that have any."""
        return self._read(keys, codes=True)

    def _read(self, keys: Sequence[str], *, codes: bool) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for page in batch_iterate(_PAGE, keys):
            found |= self._find(page, codes=codes)
        return found

    def add(self, keys: Sequence[str], encoded: Encoded) -> None:
        """Write the codes of passages."""
        if encoded.colbert is not None:
            self._write(dict(zip(keys, encoded.colbert, strict=True)))

    def _find(self, keys: Sequence[str], *, codes: bool = True) -> dict[str, bytes]:
        raise NotImplementedError

    def _write(self, rows: Mapping[str, bytes]) -> None:
        raise NotImplementedError


class CodesInFolder(ColbertCodes):
    """A SQLite database in the folder of a local Chroma."""

    def _find(self, keys: Sequence[str], *, codes: bool = True) -> dict[str, bytes]:
        with self._database() as database:
            if database is None:
                return {}
            columns = "key, codes" if codes else "key, x''"
            marks = ", ".join("?" * len(keys))
            query = f"SELECT {columns} FROM passages WHERE key IN ({marks})"  # noqa: S608
            return dict(database.execute(query, list(keys)))

    def _write(self, rows: Mapping[str, bytes]) -> None:
        with self._database(create=True) as database:
            database.executemany("INSERT OR REPLACE INTO passages VALUES (?, ?)", rows.items())

    def remove(self, keys: Sequence[str]) -> None:
        """Delete the codes of passages."""
        with self._database() as database:
            if database is not None:
                _delete(database, keys)

    def compact(self, keys: Sequence[str], replace: Replace) -> None:  # noqa: ARG002
        """Delete the codes of all other passages, and the space that they took."""
        with self._database() as database:
            if database is None:
                return
            stored = {key for [key] in database.execute("SELECT key FROM passages")}
            _delete(database, stored - set(keys))
            database.commit()
            database.execute("VACUUM")

    def drop(self) -> None:
        """Delete the database."""
        for ending in ("", "-journal"):
            self._file.with_name(f"{self._file.name}{ending}").unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.connection.folder.real / f"{self.name}.sqlite3"  # type: ignore[union-attr]

    @contextlib.contextmanager
    def _database(self, *, create: bool = False) -> Iterator[Any]:
        """A transaction; None: there is no database yet."""
        if not create and not self._file.exists():
            yield None
            return
        uri = f"{self._file.as_uri()}?mode={'rwc' if create else 'rw'}"
        folder: Any = self.connection.folder
        with (
            folder.named_errors(),
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60.0)) as database,
        ):
            if create:
                database.executescript(_SCHEMA)
            with database:
                yield database


class CodesInCollection(CollectionCompanion, ColbertCodes):
    """A second collection of the same database."""

    def _find(self, keys: Sequence[str], *, codes: bool = True) -> dict[str, bytes]:  # noqa: ARG002
        collection = self.collection()
        if collection is None:
            return {}
        found: Any = collection.get(ids=list(keys), include=["metadatas"])
        entries = zip(found["ids"], found["metadatas"], strict=True)
        return {key: base64.b64decode(entry["codes"]) for key, entry in entries}

    def _write(self, rows: Mapping[str, bytes]) -> None:
        for page in _pages(rows):
            self._upsert(list(page), list(map(_entry, page.values())))

    def remove(self, keys: Sequence[str]) -> None:
        """Delete the codes of passages."""
        self._delete(keys)

    def write_compact(self, target: Collection, keys: Sequence[str]) -> None:
        """Write the codes of passages that are stored."""
        for page in batch_iterate(_PAGE, keys):
            for rows in _pages(self._find(page)):
                entries: Any = list(map(_entry, rows.values()))
                target.upsert(ids=list(rows), embeddings=no_vectors(len(rows)), metadatas=entries)


def _pages(rows: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    """Rows in order, as many at once as a server takes."""
    return map(dict, windows(rows.items(), lambda row: len(row[1]), _REQUEST_BYTES))


def _entry(codes: bytes) -> dict[str, str]:
    return {"codes": base64.b64encode(codes).decode()}


def _delete(database: sqlite3.Connection, keys: Iterable[str]) -> None:
    database.executemany("DELETE FROM passages WHERE key = ?", ((key,) for key in keys))
