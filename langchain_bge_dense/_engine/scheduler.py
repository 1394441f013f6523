"""One thread runs the encoder: requests wait in a queue, and what waits together shares a batch.

Queries go before documents at every batch boundary.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.nn.modules.module import register_module_forward_pre_hook

from langchain_bge_dense._engine.process import at_fork

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._engine.encoder import Encoder
    from langchain_bge_dense._engine.encoding import Outputs, TextOutputs, Tokens

_STOP_SECONDS = 10.0  # how long a stop waits for the running batch
_THREAD = "bge-m3-encoder"


@dataclass(eq=False)
class Request:
    """Tokenised texts of one caller, one at least.

    Attributes:
        tokens: N texts, in the caller's order.
        outputs: What to compute.
        batch_tokens: Token budget of a batch that starts with this request.
        first: The caller's index of the first text, for errors.
        urgent: A query, which goes before documents.
        future: Gives N rows; cancelling it drops the texts that have not run.
        finished: Texts that have run.
        process: Whose thread runs them.
    """

    tokens: SequenceOf[Tokens]
    outputs: Outputs
    batch_tokens: int
    first: int = 0
    urgent: bool = False
    future: Future[list[TextOutputs]] = field(default_factory=Future)
    finished: int = 0
    process: int = field(default_factory=os.getpid)
    _rows: dict[int, TextOutputs] = field(default_factory=dict)

    def sequences(self) -> deque[Sequence]:
        """Sort the texts, the longest first: neighbours in a batch are of similar length."""
        order = sorted(range(len(self.tokens)), key=lambda i: -len(self.tokens[i].ids))
        return deque(Sequence(self, index, self.tokens[index].ids) for index in order)

    def deliver(self, position: int, row: TextOutputs | None) -> None:
        """Add the outputs of a text, and with the last one deliver all to the caller."""
        if row is None:
            msg = (
                f"Text {self.first + position} has a non-finite vector, in float32 too. "
                "The checkpoint's weights overflow or are damaged: compare them with the original."
            )
            self.fail(FloatingPointError(msg))
            return
        self._rows[position] = row.select(self.outputs)
        self.finished += 1
        if self.finished == len(self.tokens):
            with suppress(InvalidStateError):  # cancelled
                self.future.set_result([self._rows[n] for n in range(len(self.tokens))])

    def fail(self, error: BaseException) -> None:
        """Give the caller an error, unless it has gone or has another one."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Sequence(NamedTuple):
    """One text of a request."""

    request: Request
    position: int
    ids: NDArray[np.int32]  # (T,)


class Queue:
    """Requests that wait, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[Request, deque[Sequence]] = {}
        self._oldest_next = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def requests(self) -> list[Request]:
        """List the requests, the oldest first."""
        return list(self._waiting)

    def add(self, request: Request) -> None:
        """Append a request."""
        self._waiting[request] = request.sequences()

    def next_batch(self) -> list[Sequence]:
        """Texts of one request, and of the others in turn while there is room.

        That request is the oldest and the one with the fewest texts by turns, so that a short call
        does not wait for a bulk one, and a bulk one always moves on.
        """
        for request in [request for request in self._waiting if request.future.done()]:
            del self._waiting[request]
        if not self._waiting:
            return []
        self._oldest_next = not self._oldest_next
        requests = list(self._waiting)
        first = requests[0] if self._oldest_next else min(requests, key=self._texts_left)
        batch: list[Sequence] = []
        room = first.batch_tokens
        for request in [first, *(request for request in requests if request is not first)]:
            room = self._fill(batch, request, room)
        return batch

    def _texts_left(self, request: Request) -> int:
        return len(self._waiting[request])

    def _fill(self, batch: list[Sequence], request: Request, room: int) -> int:
        """Move texts of a request into a batch, at least one, and return the room that is left."""
        waiting = self._waiting[request]
        while waiting and (len(waiting[0].ids) <= room or not batch):
            batch.append(waiting.popleft())
            room -= len(batch[-1].ids)
        while waiting and len(waiting[-1].ids) <= room:  # a short text still fits
            batch.append(waiting.pop())
            room -= len(batch[-1].ids)
        if not waiting:
            del self._waiting[request]
        return room


class Scheduler:
    """Owns an encoder and the thread that loads and runs it.

    One thread for both: PyTorch's worker threads belong to the thread that called for them, and
    with two such teams each waits asleep, which costs a query a third more time.

    Args:
        load: Gives the encoder, whose `forward` is called from that thread alone.

    Attributes:
        loaded: Gives the encoder to whoever waits for it to be loaded.
    """

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self._load = load
        self._encoder: Encoder | None = None  # a future's lock may be held at a fork
        self.loaded: Future[Encoder] = Future()
        self.reset()
        _schedulers.add(self)
        with self._lock:
            self._ensure_thread()

    def reset(self) -> None:
        """Start empty, in a forked child too, as its parent's thread is not in it."""
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()
        self._queries = Queue()
        self._documents = Queue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def enqueue(self, request: Request) -> None:
        """Queue a request, unless the interpreter is exiting."""
        with self._lock:
            if self._stopped:
                msg = "The model was stopped, as Python is exiting. Embed texts before that."
                raise RuntimeError(msg)
            self._ensure_thread()
            self._inbox.put(request)

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_repeat, args=(self,), name=_THREAD, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Drop what waits, and return once the running batch is through."""
        with self._lock:
            self._stopped = True
        self._inbox.put(None)
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(_STOP_SECONDS)

    def step(self) -> bool:
        """Load the encoder or run the next batch. Returns False once the scheduler was stopped."""
        if self._encoder is None:
            return self._load_encoder()
        arrived = self._receive()
        if self._stopped:
            return False
        batch: list[Sequence] = []
        try:
            for request in arrived:
                (self._queries if request.urgent else self._documents).add(request)
            batch = self._queries.next_batch() or self._documents.next_batch()
            if batch:
                self._run(self._encoder, batch)
        except BaseException as error:  # noqa: BLE001 - no caller may wait for ever
            waiting = [*arrived, *self._queries.requests(), *self._documents.requests()]
            for request in [*waiting, *(sequence.request for sequence in batch)]:
                request.fail(error)
            self._queries, self._documents = Queue(), Queue()
        return True

    def _load_encoder(self) -> bool:
        try:
            self._encoder = self._load()
        except BaseException as error:  # noqa: BLE001 - the future carries it to the caller
            self.loaded.set_exception(error)
            return False
        self.loaded.set_result(self._encoder)
        return True

    def _receive(self) -> list[Request]:
        """Receive the requests since the last batch, or wait for one if there is nothing to do."""
        requests = [] if self._queries or self._documents else [self._inbox.get()]
        while not self._inbox.empty():
            requests.append(self._inbox.get())
        return [request for request in requests if request is not None]

    def _run(self, encoder: Encoder, batch: SequenceOf[Sequence]) -> None:
        """Run a batch and deliver its rows.

        An error is for the one caller who can have caused it: of several, each is run by itself.
        """
        requests = list(dict.fromkeys(sequence.request for sequence in batch))
        outputs = reduce(or_, {request.outputs for request in requests})
        try:
            rows = encoder.forward([sequence.ids for sequence in batch], outputs)
        except BaseException as error:  # noqa: BLE001 - futures carry it to the callers
            if len(requests) == 1 or self._stopped:
                for request in requests:
                    request.fail(error)
                return
            for request in requests:
                own = [sequence for sequence in batch if sequence.request is request]
                self._run(encoder, own)
            return
        for sequence, row in zip(batch, rows, strict=True):
            sequence.request.deliver(sequence.position, row)


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _repeat(scheduler: Scheduler) -> None:
    # A step is a call of its own, so that an idle thread holds on to no texts and no results.
    while scheduler.step():
        pass


def _stop_all() -> None:
    # A thread that comes back from PyTorch to an interpreter that is gone aborts the process.
    register_module_forward_pre_hook(_leave_batch)
    for scheduler in list(_schedulers):
        scheduler.stop()


def _leave_batch(_module: Any, _inputs: Any) -> None:
    """End a batch at its next layer. PyTorch calls it before each once Python is exiting."""
    if threading.current_thread().name == _THREAD:
        raise SystemExit


def _reset_all() -> None:
    for scheduler in list(_schedulers):
        scheduler.reset()


atexit.register(_stop_all)
at_fork(after_in_child=_reset_all)
