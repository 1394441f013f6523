"""Codes of ColBERT vectors of the passages of a collection, read by the passage.

In a folder they are a database of their own beside Chroma's: Chroma would keep each value twice,
once in an index of values. In memory and on a server they are a second collection.
"""

from __future__ import annotations

import base64
import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense.chroma.companions import (
    CollectionCompanion,
    Companion,
    no_vectors,
    text_hash,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from chromadb import Collection

    from langchain_bge_dense.chroma.companions import Encoded, Replace
    from langchain_bge_dense.chroma.connection import Connection

_PAGE = 500  # passages looked up at once
_REQUEST_BYTES = 1 << 24  # of codes; a server takes 40 MiB, where Base64 has made them a third more
# Long values fill pages of SQLite's smallest useful size to the end.
_SCHEMA = """
    PRAGMA page_size = 1024;
    CREATE TABLE IF NOT EXISTS passages (id TEXT PRIMARY KEY, text TEXT, codes BLOB);
"""


class Stored(NamedTuple):
    """What is stored of a passage."""

    text: str  # hash
    codes: bytes


class ColbertCodes(Companion):
    """Codes of passages."""

    kind = "colbert"

    @staticmethod
    def of(connection: Connection, uid: str) -> ColbertCodes:
        """The codes of a store's passages, wherever its Chroma is."""
        return (CodesInFolder if connection.folder else CodesInCollection)(connection, uid)

    def present(self, ids: Sequence[str], texts: Sequence[str]) -> set[str]:
        """Ids of the passages that have codes of their texts."""
        return set(self._of_texts(ids, texts, codes=False))

    def read(self, ids: Sequence[str], texts: Sequence[str]) -> dict[str, bytes]:
        """Codes by id; a passage whose text has changed has none.

        Args:
            ids: Of passages.
            texts: Theirs, as they are now.
        """
        found = self._of_texts(ids, texts, codes=True)
        return {passage: stored.codes for passage, stored in found.items()}

    def _of_texts(
        self, ids: Sequence[str], texts: Sequence[str], *, codes: bool
    ) -> dict[str, Stored]:
        hashes = dict(zip(ids, map(_hash, texts), strict=True))
        stored: dict[str, Stored] = {}
        for page in batch_iterate(_PAGE, ids):
            stored |= self._find(page, codes=codes)
        return {p: found for p, found in stored.items() if found.text == hashes[p]}

    def add(self, ids: Sequence[str], texts: Sequence[str], encoded: Encoded) -> None:
        """Write the codes of passages."""
        if encoded.colbert is not None:
            hashes = map(_hash, texts)
            rows = map(Stored, hashes, encoded.colbert)
            self._write(dict(zip(ids, rows, strict=True)))

    def _find(self, ids: Sequence[str], *, codes: bool = True) -> dict[str, Stored]:
        raise NotImplementedError

    def _write(self, rows: Mapping[str, Stored]) -> None:
        raise NotImplementedError


class CodesInFolder(ColbertCodes):
    """A SQLite database in the folder of a local Chroma."""

    def _find(self, ids: Sequence[str], *, codes: bool = True) -> dict[str, Stored]:
        with self._database() as database:
            if database is None:
                return {}
            columns = "id, text, codes" if codes else "id, text, x''"
            marks = ", ".join("?" * len(ids))
            query = f"SELECT {columns} FROM passages WHERE id IN ({marks})"  # noqa: S608
            return {row[0]: Stored(*row[1:]) for row in database.execute(query, list(ids))}

    def _write(self, rows: Mapping[str, Stored]) -> None:
        with self._database(create=True) as database:
            database.executemany(
                "INSERT OR REPLACE INTO passages VALUES (?, ?, ?)",
                ((passage, *stored) for passage, stored in rows.items()),
            )

    def remove(self, ids: Sequence[str]) -> None:
        """Delete the codes of passages."""
        with self._database() as database:
            if database is not None:
                rows = ((passage,) for passage in ids)
                database.executemany("DELETE FROM passages WHERE id = ?", rows)

    def compact(self, ids: Sequence[str], replace: Replace) -> None:  # noqa: ARG002
        """Delete the codes of all other passages, and the space that they took."""
        with self._database() as database:
            if database is None:
                return
            stored = {row[0] for row in database.execute("SELECT id FROM passages")}
            gone = ((passage,) for passage in stored - set(ids))
            database.executemany("DELETE FROM passages WHERE id = ?", gone)
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

    def _find(self, ids: Sequence[str], *, codes: bool = True) -> dict[str, Stored]:  # noqa: ARG002
        collection = self.collection()
        if collection is None:
            return {}
        found: Any = collection.get(ids=list(ids), include=["metadatas"])
        entries = zip(found["ids"], found["metadatas"], strict=True)
        return {
            passage: Stored(entry["text"], base64.b64decode(entry["codes"]))
            for passage, entry in entries
        }

    def _write(self, rows: Mapping[str, Stored]) -> None:
        for page in _pages(rows):
            self._upsert(list(page), [_entry(stored) for stored in page.values()])

    def remove(self, ids: Sequence[str]) -> None:
        """Delete the codes of passages."""
        self._delete(ids)

    def write_compact(self, target: Collection, ids: Sequence[str]) -> None:
        """Write the codes of passages that are stored."""
        for page in batch_iterate(_PAGE, ids):
            for rows in _pages(self._find(page)):
                entries: Any = [_entry(stored) for stored in rows.values()]
                target.upsert(ids=list(rows), embeddings=no_vectors(len(rows)), metadatas=entries)


def _pages(rows: Mapping[str, Stored]) -> Iterator[dict[str, Stored]]:
    """Rows in order, as many at once as a server takes."""
    return map(dict, windows(rows.items(), lambda row: len(row[1].codes), _REQUEST_BYTES))


def _hash(text: str) -> str:
    return f"{text_hash(text):016x}"


def _entry(stored: Stored) -> dict[str, str]:
    return {"text": stored.text, "codes": base64.b64encode(stored.codes).decode()}
