"""The calls of callers, whoever computes: a model in this process, or one on a server. No torch.

Synchronous calls, asynchronous ones and streams take one road: texts are cut into windows, a window
is a request, and the next one is prepared while the first one runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextvars import ContextVar
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from langchain_bge_dense._engine.checkpoint import HEADS
from langchain_bge_dense._engine.encoding import Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._engine.checkpoint import Checkpoint
    from langchain_bge_dense._engine.encoding import M3Encoding

T = TypeVar("T")

_AHEAD = 2  # requests under way

_POLL_SECONDS = 0.2
_CUT_TEXTS_NAMED = 5  # in a warning


class Options(NamedTuple):
    """Options of one call.

    Attributes:
        instruction: Put in front of each text.
        max_length: Tokens that a text is cut to.
        on_truncate: `"warn"`, `"raise"` or `"ignore"`.
        normalize: Scale vectors to unit length.
        batch_tokens: Tokens per forward pass, by default what suits the device.
        urgent: A query, which goes before documents.
    """

    instruction: str
    max_length: int
    on_truncate: str
    normalize: bool
    batch_tokens: int | None
    urgent: bool = False


class Running(Protocol):
    """A window of texts in computation. Cancelling its future drops those that have not run."""

    future: Future[Any]
    finished: int
    process: int


class BaseEngine(ABC):
    """A model that encodes texts: `Engine` here, `Client` on a server.

    Attributes:
        checkpoint: Of the model.
        window: Texts of a request.
        colbert_window: Texts of a request for ColBERT vectors, which are large.
    """

    checkpoint: Checkpoint
    window = 2_048
    colbert_window = 256

    @abstractmethod
    def request(self, texts: list[str], first: int, outputs: Outputs, options: Options) -> Running:
        """Make a request for checked texts, `first` being the caller's index of the first one."""

    @abstractmethod
    def enqueue(self, request: Any) -> None:
        """Start the computation of a request."""

    @abstractmethod
    def encoding(self, requests: Sequence[Any], outputs: Outputs, options: Options) -> M3Encoding:
        """Join the outputs of requests that have run."""

    @abstractmethod
    def token_strings(self, weights: dict[int, float]) -> dict[str, float]:
        """Spell the tokens of lexical weights, the largest weight first."""

    @abstractmethod
    def token_spans(self, text: str) -> list[tuple[int, int, int]]:
        """List the tokens of a text in order: id, start and end."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, without special ones."""

    def encode(
        self,
        texts: Iterable[str],
        options: Options,
        *,
        show_progress: bool = False,
        **outputs: bool,
    ) -> M3Encoding:
        """Encode N texts for the `Outputs` named, with a progress bar for several."""
        texts = list(checked_texts(texts))
        call = Call(self, texts, Outputs(**outputs), options)
        with contextlib.closing(call), _bar(len(texts), show=show_progress) as shown:
            while (request := call.advance()) is not None:
                wait(request, shown, _reported.get())
                call.collect()
            return call.warned(call.encoding())

    async def aencode(
        self, texts: Iterable[str], options: Options, *, first: int = 0, **outputs: bool
    ) -> M3Encoding:
        """Encode for an event loop. Cancelling drops the texts that have not run."""
        call = Call(self, list(checked_texts(texts)), Outputs(**outputs), options, first)
        with contextlib.closing(call):
            while (request := await asyncio.to_thread(call.advance)) is not None:
                await asyncio.wrap_future(request.future)
                call.collect()
            return call.warned(await asyncio.to_thread(call.encoding))

    def stream(self, texts: Iterable[str], options: Options) -> Iterator[NDArray[np.float32]]:
        """Yield dense vectors of any iterable one by one, each `(D,)`, in constant memory."""
        call = Call(self, checked_texts(texts), Outputs(), options)
        return self._vectors(call)

    def _vectors(self, call: Call) -> Iterator[NDArray[np.float32]]:
        with contextlib.closing(call):
            while (request := call.advance()) is not None:
                wait(request)
                call.collect()
                yield from call.warned(call.encoding()).dense  # type: ignore[misc]

    def require(self, outputs: Outputs) -> None:
        """Check that any output is requested, and that the checkpoint has the heads for it."""
        if not (outputs.dense or outputs.lexical or outputs.colbert):
            msg = "No output is asked for. Set dense, lexical or colbert to True."
            raise ValueError(msg)
        if (outputs.lexical or outputs.colbert) and not self.checkpoint.has_heads:
            msg = (
                f"{self.checkpoint.name!r} is a dense-only checkpoint: {self.checkpoint.folder} "
                f"lacks {' or '.join(HEADS)}. Copy both there, or ask for dense vectors alone."
            )
            raise ValueError(msg)


class Call:
    """One call of a caller: its texts, read a window at a time, and their results."""

    def __init__(
        self,
        engine: BaseEngine,
        texts: Iterable[str],
        outputs: Outputs,
        options: Options,
        first: int = 0,
    ) -> None:
        engine.require(outputs)
        self._engine, self._outputs = engine, outputs
        urgent = options.urgent or (isinstance(texts, list) and len(texts) == 1)
        self._options = options._replace(urgent=urgent)
        self._texts = iter(texts)
        self._size = engine.colbert_window if outputs.colbert else engine.window
        self._read = self._returned = first
        self._running: deque[Running] = deque()
        self._collected: list[Running] = []
        self._closed = False

    def advance(self) -> Running | None:
        """Enqueue the next windows, and return the oldest request, if any is left."""
        while len(self._running) < _AHEAD and not self._closed:
            window = list(islice(self._texts, self._size))
            if not window:
                break
            self._enqueue(window)
        return self._running[0] if self._running else None

    def _enqueue(self, window: list[str]) -> None:
        first = self._read
        self._read += len(window)
        texts = [check_text(text, index) for index, text in enumerate(window, first)]
        request = self._engine.request(texts, first, self._outputs, self._options)
        self._running.append(request)  # first, so that Ctrl-C right after it still cancels
        if not self._closed:
            self._engine.enqueue(request)
        if self._closed:  # meanwhile, in another thread
            request.future.cancel()

    def collect(self) -> None:
        """Take the results of the oldest request, which has run."""
        self._running[0].future.result()
        self._collected.append(self._running.popleft())

    def encoding(self) -> M3Encoding:
        """Join the results that were collected since the last time."""
        encoding = self._engine.encoding(self._collected, self._outputs, self._options)
        self._collected = []
        return encoding

    def warned(self, encoding: M3Encoding) -> M3Encoding:
        """Warn of texts that were cut, in the thread of the caller."""
        if self._options.on_truncate == "warn" and encoding.truncated.any():
            _warn_of_cuts(encoding, self._returned, self._options.max_length)
        self._returned += len(encoding.truncated)
        return encoding

    def close(self) -> None:
        """Drop the texts that have not run."""
        self._closed = True
        for request in list(self._running):
            if request.process == os.getpid():  # not of a parent, who may hold the future's lock
                request.future.cancel()


def windows(
    items: Iterable[T], size: Callable[[T], int], room: int, most: int = sys.maxsize
) -> Iterator[list[T]]:
    """Yield items in windows of at most `most` and as many as there is room for, one at least.

    >>> list(windows(["abc", "d", "e", "fghijk", "l"], len, room=4, most=2))
    [['abc', 'd'], ['e'], ['fghijk'], ['l']]
    """
    window: list[T] = []
    taken = 0
    for item in items:
        length = size(item)
        if len(window) == most or (window and taken + length > room):
            yield window
            window, taken = [], 0
        window.append(item)
        taken += length
    if window:
        yield window


def checked_texts(texts: Iterable[str]) -> Iterable[str]:
    """Check that texts are an iterable, whose items are checked one by one later."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        msg = (
            f"A single {type(texts).__name__} was passed where a list of texts is expected. "
            "Put it in a list: [text]."
        )
        raise TypeError(msg)
    return texts


def check_text(text: str, index: int) -> str:
    """Check that a text can be tokenised, and return it."""
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


def _warn_of_cuts(encoding: M3Encoding, first: int, max_length: int) -> None:
    cut = encoding.truncated.nonzero()[0].tolist()
    named = ", ".join(
        f"{first + index} ({encoding.token_counts[index]:,} tokens)"
        for index in cut[:_CUT_TEXTS_NAMED]
    )
    more = f" and {len(cut) - _CUT_TEXTS_NAMED:,} more" if len(cut) > _CUT_TEXTS_NAMED else ""
    msg = (
        f"Texts longer than max_length={max_length:,} tokens were cut: {named}{more}. "
        "Split them (count_tokens measures), raise max_length, or choose "
        'on_truncate="raise" or "ignore".'
    )
    warn_caller(msg)


def warn_caller(message: str) -> None:
    """Warn at the line that called LangChain or this package."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - as warnings itself does
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("langchain"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


@contextlib.contextmanager
def _bar(total: int, *, show: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar, which a function moves by texts that have run."""
    if not show or total < 2:  # noqa: PLR2004 - one text is over before a bar says anything
        yield _to_nobody
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="text", desc="Embedding") as bar:
        yield bar.update


def _to_nobody(_texts: int) -> None:
    pass


_reported: ContextVar[Callable[[int], object]] = ContextVar("reported", default=_to_nobody)


@contextlib.contextmanager
def reporting(report: Callable[[int], object]) -> Iterator[None]:
    """Report to a function how many more texts of the calls inside have run, as they run."""
    token = _reported.set(report)
    try:
        yield
    finally:
        _reported.reset(token)


def result(future: Future[T]) -> T:
    """Wait for a future, until Ctrl-C."""
    # A wait without a limit cannot be interrupted on every platform.
    while not future.done():
        with contextlib.suppress(FutureTimeoutError):
            future.exception(_POLL_SECONDS)
    return future.result()


def wait(request: Running, *reports: Callable[[int], object]) -> None:
    """Wait until a request has run, and report how many more of its texts have."""
    shown = 0
    while True:
        if request.process != os.getpid():
            msg = "The process was forked during this call. Make the call again in the child."
            raise RuntimeError(msg)
        with contextlib.suppress(FutureTimeoutError):
            request.future.exception(_POLL_SECONDS)
        if more := request.finished - shown:
            for report in reports:
                report(more)
            shown += more
        if request.future.done():
            return
