"""One thread runs the encoder; callers hand it texts and get a future.

Queries go before documents at every batch boundary, and what waits together shares a batch. Knows
no LangChain and no model: only an encoder with `tokenize`, `forward` and `collect`.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from functools import reduce
from operator import or_
from queue import SimpleQueue
from typing import TYPE_CHECKING

from langchain_bge_dense._encoder import Row, Signals
from langchain_bge_dense._jobs import Item, Job, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_bge_dense._encoder import Encoder

# How long the interpreter's exit waits for a running batch.
_EXIT_SECONDS = 5.0

_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Owns an encoder and the thread that runs it.

    Args:
        encoder: Called from that thread alone, but for `tokenize`, which a second one calls.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.reset()
        _schedulers.add(self)

    def reset(self) -> None:
        """Start empty; a forked child does so too, as its parent's threads are not in it."""
        self._wake = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._untokenized: SimpleQueue[Job | None] = SimpleQueue()
        self._queries = Waiting()
        self._documents = Waiting()
        self._threads: list[threading.Thread] = []
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Queue a job; its future gives the result.

        Raises:
            RuntimeError: The scheduler was stopped.
        """
        with self._wake:
            if self._stopped:
                msg = "The model was closed during this call. Call again to load it anew."
                raise RuntimeError(msg)
            if not self._threads:
                self._start()
            if job.urgent:
                self._inbox.append(job)
                self._wake.notify()
            else:
                self._untokenized.put(job)

    def stop(self, timeout: float | None = None) -> None:
        """Cancel what waits, and return once the running batch is through."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
            self._untokenized.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def _start(self) -> None:
        for name, target in (("encoder", self._encode), ("tokenizer", self._tokenize)):
            thread = threading.Thread(target=target, name=f"bge-m3-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _tokenize(self) -> None:
        """Tokenise documents beside the running batch, so that neither waits for the other."""
        while (job := self._untokenized.get()) is not None:
            if self._stopped:
                job.future.cancel()
            elif _attempt(job, job.tokenize, self._encoder):
                with self._wake:
                    self._inbox.append(job)
                    self._wake.notify()

    def _encode(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                arrived, self._inbox = self._inbox, deque()
            if self._stopped:
                _cancel([*arrived, *self._queries.jobs(), *self._documents.jobs()])
                return
            self._admit(arrived)
            batch = self._queries.take() or self._documents.take()
            if batch:
                self._run(batch)

    def _has_work(self) -> bool:
        return bool(self._stopped or self._inbox or self._queries or self._documents)

    def _admit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not job.urgent:
                self._documents.add(job)
            elif _attempt(job, job.tokenize, self._encoder):
                self._queries.add(job)

    def _run(self, batch: list[Item]) -> None:
        """Run a batch and hand out its rows; an error goes to the caller who caused it."""
        jobs = dict.fromkeys(item.job for item in batch)
        signals = reduce(or_, (job.signals for job in jobs))
        try:
            rows = self._encoder.forward([item.ids for item in batch], signals)
        except BaseException as error:  # noqa: BLE001 - futures carry it to the callers
            if len(jobs) == 1:
                next(iter(jobs)).fail(error)
                return
            for job in jobs:
                self._run([item for item in batch if item.job is job])
            return
        for item, row in zip(batch, rows, strict=True):
            item.job.rows[item.place] = _only(row, item.job.signals)
            item.job.finished += 1
        for job in jobs:
            if job.finished == len(job.texts):
                _attempt(job, job.finish, self._encoder)


def _only(row: Row, signals: Signals) -> Row:
    """Leave out what batch mates asked for."""
    return Row(
        row.dense if signals.dense else None,
        row.weights if signals.lexical else None,
        row.colbert if signals.colbert else None,
    )


def _attempt(job: Job, step: Callable[[Encoder], None], encoder: Encoder) -> bool:
    try:
        step(encoder)
    except BaseException as error:  # noqa: BLE001 - the job's future carries it to the caller
        job.fail(error)
        return False
    return True


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.future.cancel()


def _stop_all() -> None:
    for scheduler in list(_schedulers):
        scheduler.stop(_EXIT_SECONDS)


def _reset_all() -> None:
    for scheduler in list(_schedulers):
        scheduler.reset()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
