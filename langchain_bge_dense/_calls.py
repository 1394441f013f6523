"""One call of a caller: its texts into jobs, window by window, and their results in order.

Knows no LangChain and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import warnings
from collections import deque
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_bge_dense._jobs import Job
from langchain_bge_dense._texts import checked, windows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from tqdm import tqdm

    from langchain_bge_dense._encoder import Signals
    from langchain_bge_dense._encoding import M3Encoding
    from langchain_bge_dense._engine import Engine
    from langchain_bge_dense._jobs import Encoded

# Texts whose tokens and results are held at once, two windows at a time. ColBERT vectors are large;
# an event loop should not be held up while a window turns into Python floats.
WINDOW = 2_048
COLBERT_WINDOW = 256
ASYNC_WINDOW = 128

_POLL_SECONDS = 0.2
_AHEAD = 2  # windows under way
_NAMED = 5  # texts named in a warning


@dataclass(frozen=True)
class Call:
    """How one call's texts are to be encoded.

    Attributes:
        engine: The loaded model; the call keeps it alive.
        signals: What to compute.
        instruction: Put in front of each text.
        max_length: Tokens that a text is cut to.
        batch_tokens: Padded tokens per forward pass.
        normalize: Scale vectors to unit length.
        on_truncate: `"warn"`, `"raise"` or `"ignore"`.
        urgent: A query, which goes before documents.
    """

    engine: Engine
    signals: Signals
    instruction: str
    max_length: int
    batch_tokens: int
    normalize: bool
    on_truncate: str
    urgent: bool = False

    def run(self, texts: Iterable[str], bar: tqdm[Any] | None = None) -> Iterator[Encoded]:
        """Results window by window, one window ahead of what is taken."""
        size = COLBERT_WINDOW if self.signals.colbert else WINDOW
        running: deque[Job] = deque()
        try:
            for first, window in windows(texts, size):
                self._submit(running, first, window)
                if len(running) == _AHEAD:
                    yield _result(running, bar)
            while running:
                yield _result(running, bar)
        finally:
            _cancel(running)

    async def arun(self, texts: Iterable[str]) -> AsyncIterator[Encoded]:
        """The same for an event loop, which is never blocked."""
        running: deque[Job] = deque()
        try:
            for first, window in windows(texts, ASYNC_WINDOW):
                self._submit(running, first, window)
                if len(running) == _AHEAD:
                    yield await _aresult(running)
            while running:
                yield await _aresult(running)
        finally:
            _cancel(running)

    def _submit(self, running: deque[Job], first: int, texts: list[str]) -> None:
        job = Job(
            texts=[self.instruction + text for text in checked(texts, first)],
            signals=self.signals,
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
            first=first,
            urgent=self.urgent,
            refuse_long=self.on_truncate == "raise",
        )
        running.append(job)  # first, so that Ctrl-C right after it still cancels the job
        self.engine.submit(job)

    def stream(self, texts: Iterable[str]) -> Iterator[NDArray[np.float32]]:
        """Dense vectors one by one, each `(D,)`."""
        first = 0
        for part in self.run(texts):
            yield from self.dense(part, first)
            first += len(part.tokens)

    def floats(self, part: Encoded, first: int = 0) -> list[list[float]]:
        """Dense vectors of a window as Python floats."""
        vectors: list[list[float]] = self.dense(part, first).tolist()
        return vectors

    def dense(self, part: Encoded, first: int = 0) -> NDArray[np.float32]:
        """Dense vectors of a window that begins at the text `first`, `(N, D)`."""
        self._report_cuts([tokens.total for tokens in part.tokens], first)
        from langchain_bge_dense._encoding import dense_vectors

        return dense_vectors(part, normalize=self.normalize)

    def encoding(self, parts: Sequence[Encoded]) -> M3Encoding:
        """All windows of the call in one."""
        from langchain_bge_dense._encoding import assemble

        encoding = assemble(
            parts,
            self.signals,
            dimension=self.engine.checkpoint.dimension,
            max_length=self.max_length,
            unweighted=self.engine.encoder.unweighted,
            normalize=self.normalize,
        )
        self._report_cuts(encoding.token_counts.tolist())
        return encoding

    def _report_cuts(self, counts: Sequence[int], first: int = 0) -> None:
        """Warn of texts that were longer than `max_length`, where that is asked for."""
        if self.on_truncate != "warn":
            return
        cut = [(index, n) for index, n in enumerate(counts, first) if n > self.max_length]
        if cut:
            named = ", ".join(f"{index} ({count:,} tokens)" for index, count in cut[:_NAMED])
            more = f" and {len(cut) - _NAMED:,} more" if len(cut) > _NAMED else ""
            msg = (
                f"Texts longer than max_length={self.max_length:,} tokens were cut: {named}{more}. "
                "Split them (count_tokens measures), raise max_length, or choose "
                'on_truncate="raise" or "ignore".'
            )
            warnings.warn(msg, UserWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The `stacklevel` that makes a warning point at the code that called this package."""
    package = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 1  # noqa: SLF001
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def _result(running: deque[Job], bar: tqdm[Any] | None) -> Encoded:
    job = running[0]
    shown = 0
    while not job.future.done():
        # A wait without a limit cannot be interrupted on every platform.
        with contextlib.suppress(FutureTimeoutError):
            job.future.exception(_POLL_SECONDS)
        shown = _advance(bar, job.finished, shown)
        if job.process != os.getpid():
            msg = "The process was forked during this call. Make the call again in the child."
            raise RuntimeError(msg)
    _advance(bar, job.finished, shown)
    running.popleft()
    return job.future.result()


def _advance(bar: tqdm[Any] | None, finished: int, shown: int) -> int:
    if bar is not None:
        bar.update(finished - shown)
    return finished


async def _aresult(running: deque[Job]) -> Encoded:
    encoded = await asyncio.wrap_future(running[0].future)
    running.popleft()
    return encoded


def _cancel(running: Iterable[Job]) -> None:
    for job in running:
        job.future.cancel()


@contextlib.contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[tqdm[Any] | None]:
    """A bar over texts, or None."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="text", desc="Embedding") as bar:
        yield bar
