"""A collection of Chroma whose calls are guarded.

Each call is guarded once: made again after another process has written or compacted, and while a
server does not answer; ids and bodies in parts that Chroma takes; errors that say what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from chromadb.errors import InternalError
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense._scoring import cosines
from langchain_bge_dense.chroma.filters import exact
from langchain_bge_dense.chroma.settings import add_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chromadb.api.models.Collection import Collection
    from numpy.typing import ArrayLike, NDArray

    from langchain_bge_dense.chroma.session import Session

T = TypeVar("T")

_IDS = 10_000  # of one request: SQLite takes 32,766 values, those of a filter among them
_NUMBER = 24  # bytes of a number in a request to a server
_ANSWER = ("metadatas", "documents", "distances")
_LOW_BITS = np.uint32(0b1111)  # of the 23 of a mantissa: 6e-7 of a vector's length
_ROUNDING = 1e-6  # of a distance
_LEAST = 100  # asked of a graph: ten nearest may look sound where a crowd hides nearer ones
_WIDER = 8  # times as many are asked for next
_DIFFERENT = 200  # distances of an answer that show that the graph saw more than equal ones


class _Query(NamedTuple):
    """A vector, `(D,)`, the columns of its answer, and what an answer has to pass."""

    vector: Any
    names: Sequence[str]
    filters: Mapping[str, Any]
    among: Sequence[str] | None


class GuardedCollection:
    """A collection of Chroma by its name.

    `follow` is called with Chroma's own whenever it is opened; with `create`, its configuration, it
    is made when it is first written to.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        *,
        follow: Callable[[Collection], None] | None = None,
        create: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self.name = session, name
        self._follow, self._create = follow, create
        self._opened: Collection | None = None
        self._epoch = -1

    def find(self) -> Collection | None:
        """Find the collection as it is now, if it exists."""
        session = self.session
        session.refresh()
        if self._opened is None or self._epoch != session.epoch:
            with session.exclusive():
                epoch, found = session.epoch, session.find(self.name)
            if found is not None and self._follow is not None:
                self._follow(found)
            self._epoch, self._opened = epoch, found
        return self._opened

    def open(self) -> Collection:
        """Find the collection as it is now, or make it if it may be made."""
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
        """Open the collection anew when it is next used."""
        self._opened = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the collection."""
        return self._read(lambda collection: collection.metadata or {})

    @property
    def configuration_json(self) -> dict[str, Any]:
        """Configuration of the collection."""
        return self._read(lambda collection: collection.configuration_json)

    def count(self) -> int:
        """Count the records."""
        return self._read(lambda collection: collection.count())

    def get(
        self,
        ids: str | Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int | None = None,
        offset: int | None = None,
        **options: Any,
    ) -> Any:
        """Call Chroma's `get` with any number of ids."""
        options["where"] = exact(where) if where else None
        options["where_document"] = options.get("where_document") or None
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
        """Call Chroma's `query`, and complete answers that lack passages.

        A graph in which many vectors are equal gives short answers, or little but those vectors:
        then more is asked for, and what is not reached is compared one by one.

        `among` are the ids of all passages that pass the filters, if these are known: Chroma need
        not find them again.
        """
        filters = {name: value for name, value in which.items() if value not in (None, {})}
        if "where" in filters:
            filters["where"] = exact(filters["where"])
        names = list(dict.fromkeys((*_ANSWER, *include)))
        answers = [
            self._nearest(_Query(each, names, filters, among), n_results)
            for each in query_embeddings
        ]
        return {
            name: [[row[name] for row in rows] for rows in answers] for name in ("ids", *include)
        }

    def _nearest(self, query: _Query, count: int) -> list[dict[str, Any]]:
        needed = count + 1  # one more shows what comes next
        asked = max(needed, _LEAST) if count > 0 else count  # Chroma refuses 0 and less
        rows = self._reached(query, asked)
        reached = [row["ids"] for row in rows]
        # SPANN, the index of Chroma Cloud, is no graph.
        if len(rows) == asked and _is_crowded(rows) and self.configuration_json.get("hnsw"):
            reached, needed = self._wider(query, asked)
            rows = self._compared(query, reached[:count])
        if len(reached) < needed:
            rows += self._compared(query, self._unreached(query, set(reached)))
        return sorted(rows, key=lambda row: float(row["distances"]))[:count]

    def _wider(self, query: _Query, asked: int) -> tuple[list[str], int]:
        """Ask for more until enough are different, and return their ids, and how many were asked.

        All that Chroma keeps in view may be equal: it sees as much further as it is asked for more.
        """
        query = query._replace(names=["distances"])
        while True:
            asked *= _WIDER
            rows = self._reached(query, asked)
            if len(rows) < asked or not _is_crowded(rows):
                return [row["ids"] for row in rows], asked

    def _reached(self, query: _Query, count: int) -> list[dict[str, Any]]:
        """Ask Chroma's graph for the nearest."""
        vector, names, filters, among = query
        options: Any = {"query_embeddings": [vector], "include": names, "n_results": count}

        def call(collection: Collection) -> Any:
            if among:
                with contextlib.suppress(InternalError):  # one of them was deleted meanwhile
                    return collection.query(ids=list(among), **options)
            return collection.query(**options, **filters)

        found = self._read(call)
        return _rows({name: found[name][0] for name in ("ids", *names)})

    def _unreached(self, query: _Query, reached: set[str]) -> Sequence[str]:
        """Find the ids of all that pass the filters, without those that were reached."""
        passing, filters = query.among, query.filters
        if passing is None:
            most = len(filters["ids"]) if "ids" in filters else None if filters else self.count()
            if most is not None and most <= len(reached):
                return ()
            passing = self.get(include=[], **filters)["ids"]
        return [each for each in passing or () if each not in reached]

    def _compared(self, query: _Query, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Compute the distances of records."""
        rows, vector = [], np.asarray(query.vector, np.float32)  # (D,)
        columns = [name for name in query.names if name not in {"distances", "embeddings"}]
        for page in batch_iterate(_IDS, ids):
            found = self.get(page, include=[*columns, "embeddings"])
            if found["ids"]:
                vectors = np.asarray(found["embeddings"], np.float32)  # (N, D)
                distances = 1 - cosines(vectors, vector)  # (N,)
                kept = {name: found[name] for name in ("ids", "embeddings", *columns)}
                rows += _rows({**kept, "distances": distances.tolist()})
        return rows

    def upsert(
        self,
        *,
        ids: Sequence[str],
        embeddings: Any,
        metadatas: Sequence[Mapping[str, Any] | None],
        documents: Sequence[str] | None = None,
    ) -> None:
        """Call Chroma's `upsert` in parts that it takes."""
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
        vectors = _with_ties_broken(ids, embeddings)
        for part in parts:
            columns: Any = {
                "ids": [ids[number] for number in part],
                "embeddings": [vectors[number] for number in part],
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
        self._read(lambda collection: add_metadata(collection, metadata))
        self.forget()

    def search(self, searches: Any) -> Any:
        """Call Chroma Cloud's `search`."""
        return self._read(lambda collection: collection.search(searches))

    def _read(self, call: Callable[[Collection], T]) -> T:
        return self.session.read(lambda: call(self.open()))


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Turn columns into rows of passages, without those that were deleted meanwhile."""
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [row for row in rows if row.get("documents", "") is not None]


def _is_crowded(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether an answer ends in or mostly is equal passages, with few different ones.

    Others may be nearer than they are: a graph that sees equal ones alone goes no way that leads
    past them.
    """
    new = np.diff([float(row["distances"]) for row in rows]) >= _ROUNDING  # (N-1,)
    different = int(new.sum())
    return different < _DIFFERENT and bool(not new[-1] or different < len(rows) // 2)


def _with_ties_broken(ids: Sequence[str], vectors: ArrayLike) -> NDArray[np.float32]:
    """Let no two vectors, `(N, D)`, be equal: the last bits of their numbers are those of a hash.

    Chroma's graph links a vector to its nearest: more equal ones than it has links to give are
    linked to each other alone, and a search that meets one sees nothing else.
    """
    numbers = np.array(vectors, np.float32)  # (N, D)
    bits = numbers.view(np.uint32)
    for row, passage in enumerate(ids):
        digest = hashlib.shake_128(passage.encode()).digest(bits.shape[1])
        bits[row] = (bits[row] & ~_LOW_BITS) | (np.frombuffer(digest, np.uint8) & _LOW_BITS)
    return numbers


def _joined(parts: Sequence[Any], first: int, last: int | None) -> Any:
    """Join a column of several answers of Chroma."""
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
