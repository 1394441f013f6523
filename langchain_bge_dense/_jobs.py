"""Callers' texts while they wait: which of them go into the next batch.

Plain data and no threads. Knows no model: only token counts, callers and their order.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._encoder import Encoder, Row, Signals, Tokens, Vectors

# A batch more costs about as much as this part of the budget in padding, on a CPU and on a GPU.
_PADDING = 16


class Encoded(NamedTuple):
    """What a job's future gives: outputs in the order of its texts, not normalised."""

    vectors: Vectors
    tokens: list[Tokens]


@dataclass(eq=False)
class Job:
    """Texts of one caller, one at least.

    Attributes:
        texts: In the caller's order.
        signals: What to compute.
        max_length: Tokens that a text is cut to.
        batch_tokens: Padded tokens that a batch may have which is built around one of these texts.
        first: The caller's index of the first text, for errors.
        urgent: A query, which goes before documents.
        refuse_long: Fail where a text is longer than `max_length`.
        future: Gives an `Encoded`; cancelling it drops the texts that have not run.
        finished: Texts that have run.
        process: Whose thread runs it.
    """

    texts: Sequence[str]
    signals: Signals
    max_length: int
    batch_tokens: int
    first: int = 0
    urgent: bool = False
    refuse_long: bool = False
    future: Future[Encoded] = field(default_factory=Future)
    tokens: list[Tokens] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)
    finished: int = 0
    process: int = field(default_factory=os.getpid)

    @property
    def tokenized(self) -> bool:
        return len(self.tokens) == len(self.texts)

    @property
    def complete(self) -> bool:
        return self.finished == len(self.texts)

    @property
    def ids(self) -> list[NDArray[np.int32]]:
        return [tokens.ids for tokens in self.tokens]

    def tokenize(self, encoder: Encoder, count: int) -> None:
        """Add the next `count` texts to `tokens`.

        Raises:
            ValueError: A text is too long and `refuse_long` is set.
        """
        start = len(self.tokens)
        self.tokens += encoder.tokenize(self.texts[start : start + count], self.max_length)
        self.rows += [None] * (len(self.tokens) - start)
        for index, tokens in enumerate(self.tokens[start:], self.first + start):
            if self.refuse_long and tokens.total > self.max_length:
                msg = (
                    f"Text {index} has {tokens.total:,} tokens, more than "
                    f"max_length={self.max_length:,}. Split it (count_tokens measures), raise "
                    'max_length, or accept the cut with on_truncate="warn".'
                )
                raise ValueError(msg)

    def store(self, place: int, row: Row) -> None:
        """Keep what a text gave."""
        self.rows[place] = row
        self.finished += 1

    def succeed(self, vectors: Vectors) -> None:
        """Give the caller the result, unless it has gone."""
        with suppress(InvalidStateError):
            self.future.set_result(Encoded(vectors, self.tokens))

    def fail(self, error: BaseException) -> None:
        """Give the caller an error, unless it has gone or has another one."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Item(NamedTuple):
    """One text of a job; sorts by length, then by arrival."""

    length: int
    serial: int
    job: Job
    place: int

    @property
    def ids(self) -> NDArray[np.int32]:
        return self.job.tokens[self.place].ids


@dataclass(eq=False)
class _Caller:
    items: list[Item]  # by length; those that went into others' batches leave when they come last
    left: int


class Waiting:
    """Tokenised texts that wait: in order of length, their callers in order of arrival."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._callers: dict[Job, _Caller] = {}
        self._serial = 0
        self._turn = False

    def __bool__(self) -> bool:
        return bool(self._items)

    def jobs(self) -> list[Job]:
        """The callers, the oldest first."""
        return list(self._callers)

    def add(self, jobs: Sequence[Job]) -> None:
        """Put tokenised jobs' texts in."""
        for job in jobs:
            items = [
                Item(len(tokens.ids), self._serial + place, job, place)
                for place, tokens in enumerate(job.tokens)
            ]
            items.sort(key=itemgetter(0))
            self._serial += len(items)
            self._callers[job] = _Caller(items, len(items))
            self._items += items
        if jobs:
            self._items.sort(key=itemgetter(0))  # stable, so that `Item`s are in their own order

    def take(self) -> list[Item]:
        """The next batch: one caller's longest text and its neighbours in length.

        That caller is the oldest and the one with the fewest texts in turn, so that a short call
        does not wait for a bulk one, and a bulk one always moves on.
        """
        while self._callers:
            seed = self._seed()
            start, stop = run_around(self._items, seed, self._items[seed].job.batch_tokens)
            batch = self._items[start:stop]
            if any(item.job.future.done() for item in batch):
                self._drop_done()
                continue
            del self._items[start:stop]
            for item in batch:
                self._leave(item.job)
            return batch
        return []

    def _seed(self) -> int:
        self._turn = not self._turn
        if self._turn:
            items = next(iter(self._callers.values())).items
        else:
            items = min(self._callers.values(), key=attrgetter("left")).items
        while True:
            seed = bisect_left(self._items, items[-1])
            if seed < len(self._items) and self._items[seed] is items[-1]:
                return seed
            items.pop()

    def _leave(self, job: Job) -> None:
        caller = self._callers[job]
        caller.left -= 1
        if not caller.left:
            del self._callers[job]

    def _drop_done(self) -> None:
        for job in [job for job in self._callers if job.future.done()]:
            del self._callers[job]
        self._items = [item for item in self._items if item.job in self._callers]


def run_around(items: Sequence[Item], seed: int, budget: int) -> tuple[int, int]:
    """Bounds of a run in length order that holds a text and fits the budget once padded.

    Shorter neighbours come first, then longer ones where there is room left; neither where padding
    would cost more than a batch of their own.

    Args:
        items: Texts by length.
        seed: The one that the run must hold, even if it is over the budget alone.
        budget: Padded tokens.
    """
    start, stop = seed, seed + 1
    longest = items[seed].length
    spare = budget // _PADDING
    while start > 0 and (stop + 1 - start) * longest <= budget:
        spare -= longest - items[start - 1].length
        if spare < 0:
            return start, stop
        start -= 1
    while stop < len(items) and (stop + 1 - start) * items[stop].length <= budget:
        spare -= (stop - start) * (items[stop].length - longest)
        if spare < 0:
            break
        longest = items[stop].length
        stop += 1
    return start, stop
