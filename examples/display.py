"""Passages and answers on a terminal of any width, where Chinese has no blanks to break at."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

from langchain_core.documents import Document
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

WIDEST = 100  # cells that are pleasant to read
LINES = 3  # of a passage

CJK = r"\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
OPENING = r"“‘（《「『【\["
CLOSING = r"，。！？；：、”’）》」』】\]"
# A word, or one character of a script that may break anywhere but inside of its punctuation.
UNIT = re.compile(rf"[{OPENING}]*(?:[^\s{CJK}]+|\S)[{CLOSING}]*\s*")


def console(*, stderr: bool = False, widest: int = WIDEST) -> Console:
    """Open the terminal at its present width, up to `widest`."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, widest)
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Put a blank for each control character, which documents must not send to a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def quoted(token: str) -> str:
    """Quote a token that stands beside a number, which a hyphen would make a negative one."""
    return f'"{plain(token)}"'


def plain(text: str) -> str:
    """Bring a text to one line of printable characters."""
    return " ".join(printable(text).split())


def wrap(text: Text, width: int) -> Iterator[Text]:
    """Break a text into lines between words; rich alone breaks at blanks, and Chinese has none."""
    breaks, used = [], 0
    for unit in UNIT.finditer(text.plain):
        if used + cell_len(unit[0].rstrip()) > width and used:
            breaks.append(unit.start())
            used = 0
        used += cell_len(unit[0])
    for line in text.divide(breaks):
        line.rstrip()
        yield from line.wrap(console(), width)  # breaks what is one word and longer than a line


def write(out: Console, text: Text | str, *, indent: int = 0, lines: int | None = None) -> None:
    """Print a text, wrapped behind blanks, with an ellipsis where more lines would follow."""
    width = out.width - indent
    wrapped = list(wrap(Text(text) if isinstance(text, str) else text, width))
    if lines and len(wrapped) > lines:
        last = next(wrap(wrapped[lines - 1], width - 2))
        wrapped[lines - 1 :] = [Text.assemble(last, " …")]
    for line in wrapped:
        out.print(Text.assemble(" " * indent, line))


def fit(text: str, width: int) -> str:
    """Bring a text to a width: blanks behind a shorter one, an ellipsis inside of a longer one."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    tail = text[len(text) - width // 2 :]
    while tail and cell_len(tail) >= width // 2:
        tail = tail[1:]
    return set_cell_size(text, width - 1 - cell_len(tail)) + "…" + tail


def readable(passage: Document, text: Text | None = None) -> Text:
    """Bring a passage, or its styled text, to one line without Markdown's marks."""
    text = Text(printable(passage.page_content)) if text is None else text
    lines = [heading(line) for line in text.split("\n") if line.plain.strip()]
    record = passage.metadata.keys() & {"row", "pointer"}
    return Text(" · " if record else " ").join(lines)


def heading(line: Text) -> Text:
    """Put a colon behind a Markdown heading for the mark before it."""
    mark = re.match("#+ ", line.plain)
    return Text.assemble(line[mark.end() :], ":") if mark else line


def location(passage: Document) -> str:
    """Name file and page or row, as a reader would look for them."""
    metadata = passage.metadata
    parts = [metadata["source"] + ("#" + metadata["pointer"] if "pointer" in metadata else "")]
    parts += [f"{kind} {metadata[kind]}" for kind in ("page", "row") if kind in metadata]
    return plain(", ".join(parts))


def show_passages(passages: list[Document], note: str = "") -> None:
    """Print passages with rank, score and location, below a note."""
    out = console()
    if note:
        write(out, note)
    for rank, passage in enumerate(passages, start=1):
        head = f"{rank:2}  {passage.metadata['bge_m3_dense_score']:.2f}  "
        write(out, Text.assemble(head, (location(passage), "bold")))
        write(out, readable(passage), indent=4, lines=LINES)
    out.print()


def show_answer(retrieved: dict[str, Any]) -> None:
    """Print an answer and the passages that it was drawn from."""
    out = console()
    for paragraph in printable(retrieved["answer"]).strip().splitlines():
        write(out, paragraph)
    out.print()
    for number, passage in enumerate(retrieved["passages"], start=1):
        write(out, f"[{number}] {passage.metadata['bge_m3_dense_score']:.2f}  {location(passage)}")
    out.print()
