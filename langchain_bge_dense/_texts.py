"""Checks on what callers pass as text, and the cut of long lists into windows.

Knows nothing of models.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def checked(texts: Iterable[str], first: int = 0) -> list[str]:
    """The texts as a list, each of them one that can be embedded.

    Args:
        texts: Anything that gives strings, but not a string itself.
        first: The caller's index of the first text, for errors.

    Raises:
        TypeError: `texts` is a string, or one of its items is none.
        ValueError: A text has a lone surrogate, which no encoding can express.
    """
    if isinstance(texts, (str, bytes)):
        msg = (
            f"A single {type(texts).__name__} was passed where a list of texts is expected. "
            "Put it in a list, or call embed_query for one text."
        )
        raise TypeError(msg)
    return [_check(text, index) for index, text in enumerate(texts, first)]


def _check(text: str, index: int) -> str:
    if not isinstance(text, str):
        msg = (
            f"Text {index} is {type(text).__name__}, not str. "
            "Convert it first, or drop it from the list."
        )
        raise TypeError(msg)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = (
            f"Text {index} has a lone surrogate, {text[error.start]!r}, at character "
            f"{error.start:,}. Decode the source with the right encoding, or clean it with "
            'text.encode("utf-8", "replace").decode().'
        )
        raise ValueError(msg) from error
    return text


def windows(texts: Iterable[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """Lists of up to `size` texts, each with the index of its first.

    >>> list(windows("abc", 2))
    [(0, ['a', 'b']), (2, ['c'])]
    """
    iterator = iter(texts)
    first = 0
    while window := list(islice(iterator, size)):
        yield first, window
        first += len(window)
