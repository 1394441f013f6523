"""LangChain documents as what Chroma stores: checked, with an id."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.documents import Document

from langchain_bge_dense._scoring import SCORE_KEYS
from langchain_bge_dense.chroma.signals import key_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS = (bool, int, float, str)  # an int is not a float of the same value, nor True an int


class Record(NamedTuple):
    """One document on its way into a collection.

    Attributes:
        id: The document's own, else SHA-256 over text and metadata.
        text: The document's `page_content`.
        metadata: Without scores of a search, and without values that are None, which Chroma does
            not keep.
        position: The document's place in the input, from 0.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    position: int

    @property
    def key(self) -> str:
        """Key of its signals."""
        return key_of(self.id, self.text)

    def equals(self, text: str | None, metadata: Mapping[str, Any] | None) -> bool:
        """Compare with what is stored, where Chroma may change the last digit of a float."""
        stored = metadata or {}
        return (
            self.text == text
            and self.metadata.keys() == stored.keys()
            and all(_same(value, stored[key]) for key, value in self.metadata.items())
        )


def record(document: Any, position: int) -> Record:
    """Check one document, whose position errors name, and make its record.

    >>> record(Document("a text", metadata={"page": 1, "author": None}), 0).metadata
    {'page': 1}
    """
    if not isinstance(document, Document) or not isinstance(document.page_content, str):
        msg = (
            f"Item {position} is {type(document).__name__}, not a Document with text. "
            "Wrap texts as Document(page_content=text)."
        )
        raise TypeError(msg)
    text = document.page_content
    metadata = checked_metadata(document.metadata, position)
    content_hash = _hash(text, metadata, position)
    passage = check_id(document.id, position) if document.id else content_hash
    return Record(passage, text, metadata, position)


def check_id(passage: object, position: int) -> str:
    """Check the id of a document."""
    if not isinstance(passage, str):
        msg = f"The id of document {position} is {passage!r}, not a str. Convert it first."
        raise TypeError(msg)
    try:
        passage.encode()
    except UnicodeEncodeError as error:
        msg = f"The id of document {position}, {passage!r}, has a lone surrogate. Take another id."
        raise ValueError(msg) from error
    if not passage:
        msg = f"The id of document {position} is empty. Pass None for a new one."
        raise ValueError(msg)
    return passage


def checked_metadata(given: Mapping[Any, Any], position: int) -> dict[str, Any]:
    """Check metadata, and reduce them to what Chroma keeps."""
    metadata = {
        key: value for key, value in given.items() if value is not None and key not in SCORE_KEYS
    }
    for key, value in metadata.items():
        _check_key(key, position)
        _check_value(key, value, position)
        if isinstance(value, float):
            metadata[key] = value + 0.0  # -0.0 is 0.0, and gets the same id
    return metadata


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    kinds = [next((k for k in _KINDS if isinstance(value, k)), None) for value in (one, other)]
    if kinds == [float, float]:
        return math.isclose(one, other, rel_tol=1e-12)
    return kinds[0] is kinds[1] and bool(one == other)


def _hash(text: str, metadata: Mapping[str, Any], position: int) -> str:
    canonical = json.dumps([text, metadata], ensure_ascii=False, sort_keys=True)
    try:
        return hashlib.sha256(canonical.encode()).hexdigest()
    except UnicodeEncodeError as error:
        msg = (
            f"Document {position} has a lone surrogate, {canonical[error.start]!r}, in its text or "
            "metadata. Decode the source with the right encoding, or clean it with "
            'text.encode("utf-8", "replace").decode().'
        )
        raise ValueError(msg) from error


def _check_key(key: Any, position: int) -> None:
    if not isinstance(key, str):
        msg = (
            f"Document {position} has the metadata key {key!r}, which is {type(key).__name__}. "
            "Make it a str."
        )
        raise TypeError(msg)
    if not key or key[0] in "#$" or key.startswith("chroma:"):
        msg = (
            f"Document {position} has the metadata key {key!r}, which Chroma keeps for itself. "
            "Rename it; keys are not empty and start with none of '#', '$' and 'chroma:'."
        )
        raise ValueError(msg)


def _check_value(key: str, value: Any, position: int) -> None:
    """Reject what Chroma rejects, and numbers that it drops or that destroy the collection."""
    items = value if isinstance(value, list) else [value]
    if not _storable(value):
        msg = (
            f"Document {position} has the metadata {key!r} = {value!r}, a {type(value).__name__} "
            "that Chroma cannot store. "
            "Use str, int, float, bool, None, or a non-empty list of one of the first four."
        )
        raise TypeError(msg)
    if not all(_in_range(item) for item in items):
        msg = (
            f"Document {position} has the metadata {key!r} = {value!r}, a number that Chroma "
            "cannot store. Use finite floats and ints of 64 bits, or make it a str."
        )
        raise ValueError(msg)


def _storable(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, (str, int, float))
    kinds = {type(item) for item in value}
    return len(kinds) == 1 and kinds <= {str, int, float, bool}


def _in_range(value: float | str) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or math.isfinite(value)
