"""Callers' texts while they wait: which of them go into the next batch.

Plain data and no threads. Knows no model: only token counts, callers and their order.
"""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._encoder import Encoder, Row, Signals, Tokens, Vectors


class Encoded(NamedTuple):
    """What a job's future gives: outputs in the order of its texts, not normalised."""

    vectors: Vectors
    tokens: list[Tokens]


@dataclass(eq=False)
class Job:
    """Texts of one caller.

    Attributes:
        texts: In the caller's order.
        signals: What to compute.
        max_length: Tokens that a text is cut to.
        batch_tokens: Padded tokens that a batch with these texts may have.
        first: The caller's index of the first text, for errors.
        urgent: A query, which goes before documents.
        refuse_long: Fail where a text is longer than `max_length`.
        finished: Texts that have run.
        future: Gives an `Encoded`; cancelling it drops the texts that have not run.
    """

    texts: Sequence[str]
    signals: Signals
    max_length: int
    batch_tokens: int
    first: int = 0
    urgent: bool = False
    refuse_long: bool = False
    finished: int = 0
    future: Future[Encoded] = field(default_factory=Future)
    tokens: list[Tokens] = field(default_factory=list)
    rows: list[Row | None] = field(default_factory=list)

    def tokenize(self, encoder: Encoder) -> None:
        """Fill `tokens`.

        Raises:
            ValueError: A text is too long and `refuse_long` is set.
        """
        self.tokens = encoder.tokenize(self.texts, self.max_length)
        self.rows = [None] * len(self.tokens)
        for index, tokens in enumerate(self.tokens):
            if self.refuse_long and tokens.total > self.max_length:
                msg = (
                    f"Text {self.first + index} has {tokens.total:,} tokens, more than "
                    f"max_length={self.max_length:,}. Split it (count_tokens measures), raise "
                    'max_length, or accept the cut with on_truncate="warn".'
                )
                raise ValueError(msg)

    def fail(self, error: BaseException) -> None:
        """Give the caller an error."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, encoder: Encoder) -> None:
        """Give the caller the result."""
        rows = [row for row in self.rows if row is not None]
        self.rows = []
        vectors = encoder.collect(rows, [tokens.ids for tokens in self.tokens], self.first)
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(Encoded(vectors, self.tokens))


class Item(NamedTuple):
    """One text of a job; sorts by length."""

    length: int
    serial: int
    job: Job
    place: int

    @property
    def ids(self) -> NDArray[np.int32]:
        return self.job.tokens[self.place].ids

    @property
    def waits(self) -> bool:
        return not self.job.future.done() and self.job.rows[self.place] is None


class Waiting:
    """Tokenised texts that wait: in order of length, their callers in order of arrival."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._callers: list[tuple[Job, list[Item]]] = []
        self._serial = 0
        self._turn = 0

    def __bool__(self) -> bool:
        return bool(self._items)

    def jobs(self) -> list[Job]:
        """The callers, the oldest first."""
        return [job for job, _ in self._callers]

    def add(self, job: Job) -> None:
        """Put a tokenised job's texts in."""
        items = [
            Item(len(tokens.ids), self._serial + index, job, index)
            for index, tokens in enumerate(job.tokens)
        ]
        self._serial += len(items)
        items.sort()
        self._callers.append((job, items))
        self._items += items
        self._items.sort()

    def take(self) -> list[Item]:
        """The next batch: one caller's longest text and its neighbours in length.

        That caller is the oldest and the one with the fewest texts in turn, so that a short call
        does not wait for a bulk one, and a bulk one always moves on.
        """
        self._drop_done()
        if not self._callers:
            return []
        self._turn ^= 1
        oldest = self._callers[0]
        job, items = oldest if self._turn else min(self._callers, key=lambda pair: len(pair[1]))
        seed = bisect_left(self._items, items[-1])
        start, stop = run_around([item.length for item in self._items], seed, job.batch_tokens)
        batch = self._items[start:stop]
        del self._items[start:stop]
        return batch

    def _drop_done(self) -> None:
        if any(job.future.done() for job, _ in self._callers):
            self._items = [item for item in self._items if not item.job.future.done()]
        for _, items in self._callers:
            while items and not items[-1].waits:
                items.pop()
        self._callers = [pair for pair in self._callers if pair[1]]


def run_around(lengths: Sequence[int], seed: int, budget: int) -> tuple[int, int]:
    """Bounds of a run in length order that holds a text and fits the budget once padded.

    Shorter neighbours come first, then longer ones where there is room left.

    >>> run_around([3, 4, 5, 9], seed=2, budget=10)
    (1, 3)
    >>> run_around([3, 4, 5, 9], seed=1, budget=40)
    (0, 4)
    """
    start = max(0, seed + 1 - max(1, budget // lengths[seed]))
    stop = seed + 1
    while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= budget:
        stop += 1
    return start, stop
