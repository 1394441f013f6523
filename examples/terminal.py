"""Passages on a terminal, where a Chinese character is two cells wide. Knows nothing of models."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_core.documents import Document

logger = logging.getLogger(__name__)

CJK = r"\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_OPENING = r"“‘（《「『【\["
_CLOSING = r"，。！？；：、”’）》」』】\]"
# A word, or one character of a script that may break anywhere but inside of its punctuation.
_UNIT = re.compile(rf"[{_OPENING}]*(?:[^\s{CJK}]+|\S)[{_CLOSING}]*\s?")


def plain(text: str) -> str:
    """Bring text to one line without control characters, which documents must not send."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def cells(text: str) -> int:
    """Count the cells that a text takes up on a terminal.

    >>> cells("BGE 模型")
    8
    """
    return sum(_cells(char) for char in text)


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def wrap(text: str, width: int, lines: int) -> list[str]:
    """Break a text into lines, and end the last with an ellipsis where more would follow.

    Args:
        text: Any text; it is made `plain` first.
        width: Cells per line.
        lines: At most so many.

    >>> wrap("one two three four", 9, 2)
    ['one two', 'three …']
    """
    wrapped = [""]
    for unit in _units(plain(text), width):
        if cells(wrapped[-1] + unit.rstrip()) <= width:
            wrapped[-1] += unit
            continue
        if len(wrapped) == lines:
            wrapped[-1] = _with_ellipsis(wrapped[-1], width)
            break
        wrapped.append(unit)
    return [line.rstrip() for line in wrapped]


def _units(text: str, width: int) -> Iterator[str]:
    for unit in _UNIT.findall(text):
        yield from [unit] if cells(unit) <= width else unit


def _with_ellipsis(line: str, width: int) -> str:
    units = list(_units(line, width - 2))
    while units and cells("".join(units)) > width - 2:
        units.pop()
    return "".join(units).rstrip() + " …"


def columns(most: int = 100) -> int:
    """Give the width to print to: the terminal's, up to what is pleasant to read."""
    return min(shutil.get_terminal_size((100, 24)).columns, most)


def fit(text: str, width: int) -> str:
    """Bring a text to a width: blanks behind a shorter one, an ellipsis inside of a longer one.

    >>> fit("troubleshooting.csv, row 12", 16)
    'troubles… row 12'
    """
    text = plain(text)
    if cells(text) > width:
        tail = _fitting(reversed(text), (width - 1) // 2)[::-1]
        text = _fitting(text, width - 1 - cells(tail)) + "…"[:width] + tail
    return text + " " * (width - cells(text))


def _fitting(characters: Iterable[str], width: int) -> str:
    """As many of the characters as there is room for."""
    taken = ""
    for char in characters:
        if cells(taken + char) > width:
            break
        taken += char
    return taken


def show_passages(passages: list[Document]) -> None:
    """Print passages with rank, score and place, each cut to three lines of the terminal."""
    for rank, passage in enumerate(passages, start=1):
        print(f"{rank:2}  {passage.metadata['score']:.2f}  {plain(place(passage))}")
        for line in wrap(readable(passage), columns() - 4, lines=3):
            print(f"    {line}")
    print(flush=True)


def readable(passage: Document) -> str:
    """Give the text without Markdown's marks, and the fields of a record with dots between."""
    if passage.metadata.keys() & {"row", "pointer"}:
        return " · ".join(passage.page_content.splitlines())
    return re.sub(r"^#+ (.*)$", r"\1:", passage.page_content, flags=re.MULTILINE)


def show_answer(retrieved: dict[str, Any]) -> None:
    """Print an answer and the passages that it was drawn from."""
    answer = "".join(char for char in retrieved["answer"] if char.isprintable() or char in "\n\t")
    print(f"{answer.strip()}\n")
    for number, passage in enumerate(retrieved["passages"], start=1):
        print(f"[{number}] {passage.metadata['score']:.2f}  {plain(place(passage))}")
    print(flush=True)


def place(passage: Document) -> str:
    """Name file and page or row, as a reader would look for them."""
    metadata = passage.metadata
    parts = [metadata["source"] + ("#" + metadata["pointer"] if "pointer" in metadata else "")]
    parts += [f"{kind} {metadata[kind]}" for kind in ("page", "row") if kind in metadata]
    return ", ".join(parts)


def short_place(passage: Document) -> str:
    """Name file and page or row where there is little room."""
    metadata = passage.metadata
    name = metadata["source"].rsplit(".", 1)[0] + metadata.get("pointer", "")
    parts = {"page": " p.", "row": ":"}
    return name + "".join(
        f"{sign}{metadata[kind]}" for kind, sign in parts.items() if kind in metadata
    )


def say(line: str) -> None:
    """Print a line about what is going on, apart from the results."""
    lines = wrap(line, columns(), lines=20) if sys.stderr.isatty() else [line]
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def complain(error: BaseException) -> None:
    """Say what went wrong in one line; --log-level debug adds where."""
    logger.debug("Where it happened:", exc_info=error)
    say(f"Error: {plain(str(error))}")


def read_line() -> str:
    """Read a line from the prompt; an empty one at Ctrl-D and Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
