"""LangChain documents into what Chroma stores: checked, with a hash for an id.

Knows no Chroma and no embeddings, only what Chroma can keep.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.documents import Document

if TYPE_CHECKING:
    from collections.abc import Mapping


class Record(NamedTuple):
    """One document on its way into a collection.

    Attributes:
        id: SHA-256 over text and metadata.
        text: The document's `page_content`.
        metadata: Without values that are None, which Chroma does not keep.
        position: The document's place in the input, from 0.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    position: int


def record(document: Any, position: int) -> Record:
    """Check one document and give it its id.

    Args:
        document: What the caller passed as one.
        position: Its place in the input, for errors.

    Raises:
        TypeError: It is no document, or has metadata of a type that Chroma cannot keep.
        ValueError: Its metadata has a key or value that Chroma cannot keep, or its text or
            metadata hold a lone surrogate.

    >>> record(Document("a text", metadata={"page": 1, "author": None}), 0).metadata
    {'page': 1}
    """
    if not isinstance(document, Document) or not isinstance(document.page_content, str):
        msg = (
            f"Item {position} is {type(document).__name__}, not a Document with text. "
            "Wrap texts as Document(page_content=text)."
        )
        raise TypeError(msg)
    metadata = {key: value for key, value in document.metadata.items() if value is not None}
    for key, value in metadata.items():
        _check_key(key, position)
        _check_value(key, value, position)
        if isinstance(value, float):
            metadata[key] = value + 0.0  # -0.0 is 0.0, and gets the same id
    text = document.page_content
    return Record(_hash(text, metadata, position), text, metadata, position)


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
    if not key or key[0] in "#$" or key == "chroma:document":
        msg = (
            f"Document {position} has the metadata key {key!r}, which Chroma keeps for itself. "
            "Rename it; keys are not empty and start with neither '#' nor '$'."
        )
        raise ValueError(msg)


def _check_value(key: str, value: Any, position: int) -> None:
    """Refuse what Chroma refuses, and numbers that it drops or that destroy the collection."""
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
