"""One thread runs the encoder; callers hand it texts and get a future.

Queries go before documents at every batch boundary, and what waits together shares a batch. Knows
no LangChain and no model: only an encoder with `tokenize`, `forward` and `collect`.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from functools import reduce
from operator import or_
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_pre_hook

from langchain_bge_dense._encoder import Row, Signals, Vectors
from langchain_bge_dense._jobs import Item, Job, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_bge_dense._encoder import Encoder

# How long a stop waits for the running batch.
_STOP_SECONDS = 10.0
# Texts tokenised before it is the next caller's turn.
_TOKENIZED_AT_ONCE = 256

_THREADS = "bge-m3-"
_PARALLELISM = "TOKENIZERS_PARALLELISM"

_quieted = False
_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Owns an encoder and the threads that run it.

    Args:
        encoder: Called from one thread alone, but for `tokenize`, which a second one calls.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.reset()
        _schedulers.add(self)

    def reset(self) -> None:
        """Start empty; a forked child does so too, as its parent's threads are not in it."""
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._untokenized: SimpleQueue[Job | None] = SimpleQueue()
        self._queries = Waiting()
        self._documents = Waiting()
        self._threads: dict[str, threading.Thread] = {}
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Queue a job; its future gives the result.

        Raises:
            RuntimeError: The interpreter is exiting.
        """
        with self._lock:
            if self._stopped:
                msg = "The model was stopped, as Python is exiting. Embed texts before that."
                raise RuntimeError(msg)
            self._need("encoder", self._encode_next)
            if job.urgent:
                self._inbox.put(job)
            else:
                self._need("tokenizer", self._tokenize_next)
                self._untokenized.put(job)

    def stop(self) -> None:
        """Drop what waits, and return once the running batch is through."""
        with self._lock:
            self._stopped = True
        self._inbox.put(None)
        self._untokenized.put(None)
        for thread in self._threads.values():
            if thread is not threading.current_thread():
                thread.join(_STOP_SECONDS)

    def _need(self, name: str, step: Callable[[], bool]) -> None:
        if name not in self._threads:
            thread = threading.Thread(
                target=_repeat, args=(step,), name=_THREADS + name, daemon=True
            )
            thread.start()
            self._threads[name] = thread

    def _tokenize_next(self) -> bool:
        """Tokenise documents beside the running batch, so that neither waits for the other."""
        job = self._untokenized.get()
        if self._stopped or job is None:
            return False
        if not job.future.done() and _attempt(job, job.tokenize, self._encoder, _TOKENIZED_AT_ONCE):
            (self._inbox if job.tokenized else self._untokenized).put(job)
        return True

    def _encode_next(self) -> bool:
        arrived = self._arrived()
        if self._stopped:
            return False
        batch: list[Item] = []
        try:
            self._admit(arrived)
            batch = self._queries.take() or self._documents.take()
            if batch:
                self._run(batch)
        except BaseException as error:  # noqa: BLE001 - no caller may wait for ever
            waiting = [*arrived, *self._queries.jobs(), *self._documents.jobs()]
            for job in [*waiting, *(item.job for item in batch)]:
                job.fail(error)
            self._queries, self._documents = Waiting(), Waiting()
        return True

    def _arrived(self) -> list[Job]:
        """Jobs that came in since the last batch; waits for one where there is nothing to do."""
        jobs = [] if self._queries or self._documents else [self._inbox.get()]
        while not self._inbox.empty():
            jobs.append(self._inbox.get())
        return [job for job in jobs if job is not None]

    def _admit(self, jobs: Sequence[Job]) -> None:
        ready = [
            job
            for job in jobs
            if job.tokenized or _attempt(job, job.tokenize, self._encoder, len(job.texts))
        ]
        self._queries.add([job for job in ready if job.urgent])
        self._documents.add([job for job in ready if not job.urgent])

    def _run(self, batch: Sequence[Item]) -> None:
        """Run a batch and hand out its rows."""
        jobs = list(dict.fromkeys(item.job for item in batch))
        signals = reduce(or_, {job.signals for job in jobs})
        try:
            rows = self._encoder.forward([item.ids for item in batch], signals)
        except BaseException as error:  # noqa: BLE001 - futures carry it to the callers
            if not self._blamed(jobs, error):
                for job in jobs:
                    self._run([item for item in batch if item.job is job])
            return
        for item, row in zip(batch, rows, strict=True):
            item.job.store(item.place, _only(row, item.job.signals))
        finished = [job for job in jobs if job.complete]
        for signals in {job.signals for job in finished}:
            self._hand_out([job for job in finished if job.signals == signals])

    def _hand_out(self, jobs: Sequence[Job]) -> None:
        """Give callers their results, copied from the device all at once."""
        rows = [row for job in jobs for row in job.rows if row is not None]
        ids = [ids for job in jobs for ids in job.ids]
        try:
            vectors = self._encoder.collect(rows, ids, jobs[0].first)
        except BaseException as error:  # noqa: BLE001 - futures carry it to the callers
            if not self._blamed(jobs, error):
                for job in jobs:
                    self._hand_out([job])
            return
        start = 0
        for job in jobs:
            job.rows.clear()
            job.succeed(_part(vectors, start, start + len(job.texts)))
            start += len(job.texts)

    def _blamed(self, jobs: Sequence[Job], error: BaseException) -> bool:
        """Give an error to the one caller who can have caused it, if it is only one."""
        if len(jobs) > 1 and not self._stopped:
            return False
        for job in jobs:
            job.fail(error)
        return True


def _repeat(step: Callable[[], bool]) -> None:
    # A step is a call of its own, so that an idle thread holds on to no texts and no results.
    while step():
        pass


def _attempt(job: Job, step: Callable[[Encoder, int], None], encoder: Encoder, count: int) -> bool:
    try:
        step(encoder, count)
    except BaseException as error:  # noqa: BLE001 - the job's future carries it to the caller
        job.fail(error)
        return False
    return True


def _only(row: Row, signals: Signals) -> Row:
    """Leave out what batch mates asked for."""
    return Row(
        row.dense if signals.dense else None,
        row.weights if signals.lexical else None,
        row.colbert if signals.colbert else None,
    )


def _part(vectors: Vectors, start: int, stop: int) -> Vectors:
    return Vectors(
        None if vectors.dense is None else vectors.dense[start:stop],
        None if vectors.weights is None else vectors.weights[start:stop],
        None if vectors.colbert is None else vectors.colbert[start:stop],
    )


def _stop_all() -> None:
    # A thread that comes back from PyTorch to an interpreter that is gone aborts the process.
    register_module_forward_pre_hook(_leave_batch)
    for scheduler in list(_schedulers):
        scheduler.stop()


def _leave_batch(_module: Any, _inputs: Any) -> None:
    """End a batch at its next layer; run by PyTorch at each once Python is exiting."""
    if threading.current_thread().name.startswith(_THREADS):
        raise SystemExit


def _before_fork() -> None:
    """Set what older tokenizers warn of at a fork where it is not set."""
    global _quieted  # noqa: PLW0603 - the way from one hook of a fork to the next
    _quieted = bool(_schedulers) and _PARALLELISM not in os.environ
    if _quieted:
        os.environ[_PARALLELISM] = "false"


def _after_fork_in_parent() -> None:
    if _quieted:
        os.environ.pop(_PARALLELISM, None)


def _after_fork_in_child() -> None:
    if _schedulers:
        os.environ[_PARALLELISM] = "false"  # its thread pool is not in the child: it would hang
    for scheduler in list(_schedulers):
        scheduler.reset()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
