"""Which words of a passage a query matched: lexical weights brought back to their places in a text.

Marks travel in the text, as pairs of characters of no width, so that what cuts and wraps a text
need not know of them. Knows no store, no terminal and no HTML.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from string import ascii_uppercase
from typing import TYPE_CHECKING, NamedTuple

from terminal import CJK, cells, readable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from langchain_core.documents import Document
    from transformers import PreTrainedTokenizerBase

    from langchain_bge_dense import BGEM3Embeddings

LEVELS = 5
OPENING = [chr(0xFE00 + level) for level in range(LEVELS)]  # variation selectors: no width
CLOSING = "\u034f"
MARKERS = "".join(OPENING) + CLOSING
VISIBLE = 0.005  # what two decimals show
WORD_START = "▁"
FAINTEST = 0.05  # of the strongest: what is left out of the marks as noise

_WORD = re.compile(r"\w")
# Two characters inside of a word, and of what is written without a blank; Chinese has neither.
_LETTERS = re.compile(rf"[^\W{CJK}]{{2}}")
_UNBROKEN = re.compile(rf"[^\s{CJK}]{{2}}")
_LONGEST_WORD = 30


class Span(NamedTuple):
    """A token's place in a text."""

    token: int
    start: int
    end: int


class Mark(NamedTuple):
    """A part of a text, and how much it counts."""

    start: int
    end: int
    strength: float


@dataclass(frozen=True)
class Word:
    """A word of the query: the tokens it is made of, each with its text and lexical weight."""

    text: str
    tokens: tuple[tuple[int, str, float], ...]

    @property
    def weight(self) -> float:
        """The sum of its tokens' weights."""
        return sum(weight for _, _, weight in self.tokens)

    def shared(self, tokens: Collection[int]) -> str:
        """The word with an ellipsis for what is not among the tokens."""
        parts = (text if token in tokens else "…" for token, text, _ in self.tokens)
        return re.sub("…+", "…", "".join(parts))


@dataclass(frozen=True)
class Match:
    """Why a passage matched.

    Attributes:
        passage: With its scores in its metadata.
        shares: What it shares of the query's words, and what that adds to the lexical score.
        marks: Where they are in the passage.
    """

    passage: Document
    shares: dict[str, float]
    marks: list[Mark]


@dataclass(frozen=True)
class Column:
    """What one way of searching found, the best first; `score` names what it goes by."""

    name: str
    note: str
    score: str
    passages: list[Document]


@dataclass(frozen=True)
class Answer:
    """The columns for a query, the query's words, and why the best passages matched."""

    query: str
    columns: list[Column]
    words: list[Word]
    matches: list[Match]

    @cached_property
    def labels(self) -> dict[str | None, str]:
        """A letter for each passage by its id, so that it is found again in other columns."""
        passages = [match.passage for match in self.matches]
        passages += chain.from_iterable(column.passages for column in self.columns)
        ids = dict.fromkeys(passage.id for passage in passages)
        return {id_: lettered(number) for number, id_ in enumerate(ids)}

    @property
    def strongest(self) -> float:
        """The strength of the strongest mark."""
        return max((mark.strength for match in self.matches for mark in match.marks), default=1)


def lettered(number: int) -> str:
    """Count with letters.

    >>> [lettered(number) for number in (0, 25, 26)]
    ['A', 'Z', 'AA']
    """
    more, last = divmod(number, len(ascii_uppercase))
    return (lettered(more - 1) if more else "") + ascii_uppercase[last]


class Explainer:
    """Explains matches by the model's own tokens and weights."""

    def __init__(self, embeddings: BGEM3Embeddings) -> None:
        from transformers import AutoTokenizer

        self._embeddings = embeddings
        embeddings.load()  # so that its files are here
        self._tokenizer = AutoTokenizer.from_pretrained(embeddings.model, local_files_only=True)

    def words(self, query: str) -> list[Word]:
        """Give the query's words with the lexical weights of their tokens."""
        [weights] = self._embeddings.encode(
            [query], dense=False, lexical=True, instruction=self._embeddings.query_instruction
        ).lexical
        groups: list[list[Span]] = []
        for span in spans(self._tokenizer, query):
            if groups and touch(_LETTERS, query, groups[-1][-1], span):
                groups[-1].append(span)
            else:
                groups.append([span])
        return [word(query, group, weights) for group in groups]

    def matches(self, words: Sequence[Word], passages: Sequence[Document]) -> list[Match]:
        """Explain each passage; what its words add sums up to its lexical score."""
        texts = [passage.page_content for passage in passages]
        found = self._embeddings.encode(texts, dense=False, lexical=True).lexical
        return [
            self._match(words, passage, weights)
            for passage, weights in zip(passages, found, strict=True)
        ]

    def _match(self, words: Sequence[Word], passage: Document, weights: dict[int, float]) -> Match:
        added: dict[int, float] = {}  # by token; one that comes twice counts once
        shares: dict[str, float] = {}
        for word in words:
            new = {t: w * weights.get(t, 0) for t, _, w in word.tokens if t not in added}
            new = {token: share for token, share in new.items() if share > 0}
            if new:
                name = word.shared(new)
                shares[name] = shares.get(name, 0) + sum(new.values())
            added |= new
        text = passage.page_content
        places = [span for span in spans(self._tokenizer, text) if span.token in added]
        marks = (Mark(start, end, added[token]) for token, start, end in places)
        ordered = dict(sorted(shares.items(), key=lambda share: -share[1]))
        return Match(passage, ordered, joined(text, marks))


def spans(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Span]:
    """Give the tokens of a text in their order.

    SentencePiece's mark of a word's start can be a token of its own, which has no width.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], names, strict=True)
    for token, (start, end), name in rows:
        yield Span(token, start, start if name == WORD_START else end)


def touch(pair: re.Pattern[str], text: str, before: Span | Mark, after: Span | Mark) -> bool:
    """Say whether one place follows the other with such a pair of characters where they meet."""
    place = after.start
    return before.end == place and bool(pair.fullmatch(text, place - 1, place + 1))


def word(text: str, group: Sequence[Span], weights: dict[int, float]) -> Word:
    """Make a word of its tokens."""
    tokens = tuple(
        (token, text[start:end] or WORD_START, weights.get(token, 0.0))
        for token, start, end in group
    )
    return Word("".join(part for _, part, _ in tokens), tokens)


def joined(text: str, marks: Iterable[Mark]) -> list[Mark]:
    """Join marks that touch inside of what is written in one, such as a part number.

    The strength of the whole is that of its strongest part. Chinese is written in one from end to
    end and not joined. Punctuation is marked between other marks alone.
    """
    whole: list[Mark] = []
    for mark in marks:
        last = whole[-1] if whole else None
        if last and touch(_UNBROKEN, text, last, mark):
            whole[-1] = Mark(last.start, mark.end, max(last.strength, mark.strength))
        else:
            whole.append(mark)
    return [Mark(*ends, mark.strength) for mark in whole if (ends := bare(text, mark))]


def bare(text: str, mark: Mark) -> tuple[int, int] | None:
    """Give the ends of a mark without punctuation around it; None where there is nothing else."""
    places = [mark.start + found.start() for found in _WORD.finditer(text[mark.start : mark.end])]
    return (places[0], places[-1] + 1) if places else None


def excerpt(match: Match, strongest: float, room: int) -> str:
    """Give the part of a passage around its best matches, with marks in it.

    Args:
        match: The passage and its marks.
        strongest: The strength that is marked most; marks of a twentieth of it are left out.
        room: How many cells wide the part may be.
    """
    text = match.passage.page_content
    marks = [mark for mark in match.marks if mark.strength >= FAINTEST * strongest]
    start, end = window(text, marks, room)
    inside = [mark for mark in marks if start <= mark.start and mark.end <= end]
    cut = marked(text, start, end, inside, strongest)
    shown = readable(match.passage.model_copy(update={"page_content": cut}))
    return "… " * (start > 0) + shown.strip() + " …" * (end < len(text))


def window(text: str, marks: Sequence[Mark], room: int) -> tuple[int, int]:
    """Give the ends of the part that holds the most matches, between words."""
    length = room * len(text) // max(cells(text), 1)
    if len(text) <= length:
        return 0, len(text)
    lead = length // 6  # some words before the first match
    starts = [max(0, min(mark.start - lead, len(text) - length)) for mark in marks] or [0]

    def held(start: int) -> float:
        inside = (m for m in marks if start <= m.start and m.end <= start + length)
        return sum({text[m.start : m.end].lower(): m.strength for m in inside}.values())

    best = max(starts, key=held)
    return word_edge(text, best), word_edge(text, best + length)


def word_edge(text: str, place: int) -> int:
    """Move a place that is inside of a word to the word's start."""
    edges = range(place, max(place - _LONGEST_WORD, 0), -1)
    return next((e for e in edges if not _UNBROKEN.fullmatch(text, e - 1, e + 1)), place)


def marked(text: str, start: int, end: int, marks: Iterable[Mark], strongest: float) -> str:
    """Put markers around the marks of a part of a text."""
    parts = []
    for mark in marks:
        opening = OPENING[level(mark.strength, strongest)]
        parts += [clean(text[start : mark.start]), opening]
        parts += [clean(text[mark.start : mark.end]), CLOSING]
        start = mark.end
    return "".join([*parts, clean(text[start:end])])


def level(strength: float, strongest: float) -> int:
    """Give the level of a mark, from 0 to `LEVELS - 1`."""
    return max(math.ceil(LEVELS * strength / strongest) - 1, 0)


def clean(text: str) -> str:
    """Drop what would be taken for a marker."""
    return text.translate(dict.fromkeys(map(ord, MARKERS)))
