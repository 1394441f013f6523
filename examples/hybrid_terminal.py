"""Rankings side by side and marked passages, on a terminal of any width."""

from __future__ import annotations

import os
import sys
from itertools import zip_longest
from typing import TYPE_CHECKING

from matches import CLOSING, MARKERS, OPENING, VISIBLE, excerpt
from terminal import cells, columns, fit, place, plain, short_place, wrap

if TYPE_CHECKING:
    from matches import Answer, Column, Match, Word

GAP = 2
MOST = 140  # cells that the columns take up side by side
LINES = 3  # of a passage
ON, OFF = "\x1b[1;4m", "\x1b[0m"  # bold and underlined


def show(answer: Answer) -> None:
    """Print the columns, the query's words with their weights, and the best passages."""
    width = columns(MOST)
    print()
    for line in table(answer, width):
        print(line.rstrip())
    width = columns()
    for line in wrap("Why: lexical weights of the query's tokens", width, 2):
        print(line)
    weights = dict.fromkeys(weighed(word) for word in answer.words if word.weight >= VISIBLE)
    for line in wrap(", ".join(weights), width - 2, LINES):
        print(f"  {line}")
    for match in answer.matches:
        print()
        show_match(match, answer, width)
    print(flush=True)


def table(answer: Answer, width: int) -> list[str]:
    """Lay the columns out side by side: four, two or one, as the width allows."""
    abreast = 4 if width >= 96 else 2 if width >= 56 else 1  # noqa: PLR2004
    each = (width + GAP) // abreast - GAP
    lines = []
    for first in range(0, len(answer.columns), abreast):
        blocks = [
            [fit(line, each) for line in block(column, answer, each)]
            for column in answer.columns[first : first + abreast]
        ]
        rows = zip_longest(*blocks, fillvalue=" " * each)
        lines += [*((" " * GAP).join(row) for row in rows), ""]
    return lines


def block(column: Column, answer: Answer, width: int) -> list[str]:
    """Write a column down: its name, what it goes by, its ranking."""
    lines = [column.name.upper(), column.note]
    for passage in column.passages:
        head = f"{answer.labels[passage.id]} {passage.metadata[column.score]:5.2f} "
        lines.append(head + fit(short_place(passage), width - cells(head)).rstrip())
    return lines if column.passages else [*lines, "no passage"]


def weighed(word: Word) -> str:
    """Write a word down with its weight, or with those of the tokens that it is made of."""
    if len(word.tokens) == 1:
        return f"{word.text} {word.weight:.2f}"
    return f"{word.text} = " + " + ".join(f"{text} {w:.2f}" for _, text, w in word.tokens)


def show_match(match: Match, answer: Answer, width: int) -> None:
    """Print a passage's place and scores, what its words add, and its text with marks."""
    scores = match.passage.metadata
    head = f"{answer.labels[match.passage.id]} {plain(place(match.passage))}"
    shares = [f"{text} {share:.2f}" for text, share in match.shares.items() if share >= VISIBLE]
    total = f"lexical {scores['lexical_score']:.2f} = {' + '.join(shares) or 'no word in common'}"
    text = excerpt(match, answer.strongest, (width - 2) * LINES - 10)
    for line in wrap(f"{head} · dense {scores['dense_score']:.2f}", width, 2):
        print(line)
    for line in [*wrap(total, width - 2, 2), *styled(text, width - 2)]:
        print(f"  {line}")


def styled(text: str, width: int) -> list[str]:
    """Wrap a text and show its marks: with escape codes on a terminal, else in brackets."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        brackets = {ord(char): "[" for char in OPENING} | {ord(CLOSING): "]"}
        return wrap(text.translate(brackets), width, LINES)
    codes = dict.fromkeys(map(ord, OPENING), ON) | {ord(CLOSING): OFF}
    lines, carried = [], ""
    for line in wrap(text, width, LINES):
        opened = carried + line
        last = next((char for char in reversed(opened) if char in MARKERS), CLOSING)
        carried = "" if last == CLOSING else last
        lines.append((opened + CLOSING * bool(carried)).translate(codes))
    return lines
