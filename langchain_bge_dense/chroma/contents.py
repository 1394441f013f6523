"""A collection that another program filled: its records, and whether a model embedded them."""

from __future__ import annotations

from collections import defaultdict
from itertools import count, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from langchain_bge_dense._scoring import SCORE_KEYS
from langchain_bge_dense.chroma.settings import SAME_COSINE, fingerprint_of, underlying
from langchain_bge_dense.embeddings import BGEM3Embeddings
from langchain_bge_dense.errors import AnotherModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from langchain_core.embeddings import Embeddings
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.collection import GuardedCollection

_PAGE = 1_000  # records read at once
_SAMPLE = 10  # texts embedded again
_LENGTHS = (256, 512, 1_024, 2_048, 4_096)  # tokens at which other tools cut texts


class Found(NamedTuple):
    """A record of Chroma."""

    id: str
    text: str | None
    metadata: Mapping[str, Any] | None
    vector: Any = None  # (D,)


def records_of(collection: GuardedCollection, *, vectors: bool) -> Iterator[Found]:
    """Yield the records of a collection in the order of their adding, in constant memory."""
    columns = ["documents", "metadatas", *["embeddings"] * vectors]
    for offset in count(0, _PAGE):  # Chroma counts up to it: the fewer pages the better
        found = collection.get(limit=_PAGE, offset=offset, include=columns)
        if not found["ids"]:
            return
        rows = found["embeddings"] if vectors else repeat(None)
        yield from map(Found, found["ids"], found["documents"], found["metadatas"], rows)


class Contents:
    """Read a collection once, from its start to its end.

    Args:
        collection: The collection.

    Attributes:
        records: How many there are.
        textless: How many of them have no text.
        first_textless: Id of the first of these.

    Raises:
        ValueError: Metadata have a key that a search writes.
    """

    def __init__(self, collection: GuardedCollection) -> None:
        self._collection = collection
        self.records = self.textless = 0
        self.first_textless = ""
        self._by_size: dict[int, set[tuple[int, str]]] = defaultdict(set)
        self._longest = (0, "")
        for found in records_of(collection, vectors=False):
            _check_keys(collection.name, found)
            self._add(found)

    def _add(self, found: Found) -> None:
        self.records += 1
        if found.text is None:
            self.textless += 1
            self.first_textless = self.first_textless or found.id
        elif size := len(found.text.strip()):
            self._longest = max(self._longest, (size, found.id))
            alike = self._by_size[size.bit_length()]
            if len(alike) < _SAMPLE:
                alike.add((size, found.id))

    def sample(self) -> Sample:
        """Select up to ten texts, from the shortest to the longest."""
        known = sorted({self._longest}.union(*self._by_size.values()))
        chosen = np.linspace(0, len(known) - 1, min(_SAMPLE, len(known))).round().astype(int)
        ids = [known[n][1] for n in chosen if known[n][0]]
        if not ids:
            return Sample([], [], np.empty((0, 0)))
        found = self._collection.get(ids, include=["documents", "embeddings"])
        vectors = np.array(found["embeddings"], np.float64)
        sample = Sample(found["ids"], found["documents"], vectors)
        return sample.only(np.flatnonzero(have_length(vectors)))


class Sample(NamedTuple):
    """Some texts with their stored vectors."""

    ids: list[str]
    texts: list[str]
    vectors: NDArray[np.float64]  # (N, D)

    def only(self, rows: Iterable[int]) -> Sample:
        """Select some of them."""
        chosen = list(rows)
        ids, texts = ([column[row] for row in chosen] for column in (self.ids, self.texts))
        return Sample(ids, texts, self.vectors[chosen])

    def cosines(self, embeddings: Embeddings) -> NDArray[np.float64]:
        """Embed the texts again, and compute the cosines to their stored vectors, `(N,)`."""
        own = np.array(embeddings.embed_documents(self.texts), np.float64)  # (N, D)
        if own.shape[1] != self.vectors.shape[1]:
            return np.zeros(len(own))
        lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(self.vectors, axis=1)  # (N,)
        return np.asarray((own * self.vectors).sum(axis=1) / lengths)


def have_length(vectors: NDArray[Any]) -> Any:
    """Tell which vectors of `(N, D)`, or whether one of `(D,)`, can have unit length."""
    lengths = np.linalg.norm(np.asarray(vectors, np.float64), axis=-1)
    return np.isfinite(lengths) & (lengths > 0)


class Origin:
    """Check that a model embedded the texts of a collection.

    Args:
        embeddings: The model.
        max_length: Tokens at which the texts were cut, by default the model's own limit.

    Raises:
        TypeError: The embeddings do not count tokens.
    """

    def __init__(self, embeddings: Embeddings, max_length: int | None = None) -> None:
        self._model: Any = underlying(embeddings)
        self._max_length, self._embeddings = max_length, embeddings
        if max_length is not None:
            if not isinstance(self._model, BGEM3Embeddings):
                msg = (
                    f"source_max_length={max_length} was given, and {type(self._model).__name__} "
                    "does not count tokens. Use BGEM3Embeddings, or leave it out."
                )
                raise TypeError(msg)
            self._embeddings = self._cutting_at(max_length)

    def _cutting_at(self, length: int) -> Embeddings:
        changed: Embeddings = self._model.model_copy(
            update={"max_length": length, "on_truncate": "ignore"}
        )
        return changed

    def has_cut(self, text: str) -> bool:
        """Tell whether a text has more tokens than were embedded."""
        limit = self._max_length
        if limit is None or 2 * len(text) < limit:  # few characters have two tokens
            return False
        return bool(self._model.count_tokens(text) + 2 > limit)

    def check(self, name: str, sample: Sample) -> None:
        """Check that the texts of a sample, embedded again, are close to their vectors.

        Args:
            name: Of the collection.
            sample: Some of its texts.

        Raises:
            AnotherModelError: They are not.
            ValueError: They are not, and their beginnings are.
        """
        cosines = sample.cosines(self._embeddings)
        differing = np.flatnonzero(~(cosines >= SAME_COSINE))
        if not len(differing):
            return
        chosen = sample.only(differing)
        pairs = zip(cosines[differing], chosen.ids, chosen.texts, strict=True)
        told = ", ".join(f"{c:.3f} for {i!r} of {len(t):,} characters" for c, i, t in pairs)
        if length := self._length_of(chosen):
            msg = (
                f"Collection {name!r} has vectors of the first {length:,} tokens of longer texts, "
                f"which embedded whole have other ones: the cosine is {told}. "
                f"Pass source_max_length={length}, and longer texts are embedded again."
            )
            raise ValueError(msg)
        msg = (
            f"Collection {name!r} was filled by another model than "
            f"{fingerprint_of(self._model)!r}: {len(differing)} of {len(cosines)} texts, embedded "
            f"again, differ from their stored vectors, and the cosine is {told}. Take the model, "
            "pooling and instructions that filled it, or index its documents into a new collection."
        )
        raise AnotherModelError(msg)

    def _length_of(self, sample: Sample) -> int | None:
        """Find the length at which cut texts would have these vectors, if there is one."""
        if not isinstance(self._model, BGEM3Embeddings):
            return None
        longest = self._model.session().documents.max_length
        lengths = [*(length for length in _LENGTHS if length < longest), longest]
        lowest = {length: sample.cosines(self._cutting_at(length)).min() for length in lengths}
        best = max(lengths, key=lowest.__getitem__)
        return best if lowest[best] >= SAME_COSINE else None


def _check_keys(name: str, found: Found) -> None:
    reserved = SCORE_KEYS.intersection(found.metadata or ())
    if reserved:
        msg = (
            f"Record {found.id!r} of collection {name!r} has the metadata key {min(reserved)!r}, "
            "which a search writes. Rename it in the collection, or delete it."
        )
        raise ValueError(msg)
