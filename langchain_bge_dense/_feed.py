"""Documents by the chunk, from any iterable, and a bar that shows how it goes.

Knows no Chroma and no embeddings.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterable, Sized
from typing import TYPE_CHECKING, TypeVar

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from langchain_bge_dense._indexing import IndexResult

logger = logging.getLogger(__name__)

T = TypeVar("T")


def chunks(documents: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items, each read when it is asked for.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    iterator = iter(documents)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


async def achunks(documents: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """The same for an event loop; what is not asynchronous is read in a thread."""
    if not isinstance(documents, AsyncIterable):
        synchronous = chunks(documents, size)
        while chunk := await asyncio.to_thread(next, synchronous, None):
            yield chunk
        return
    chunk = []
    async for document in documents:
        chunk.append(document)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar over documents, with tokens per second and, where their number is known, time left.

    Args:
        documents: What will be indexed.
        show: Whether there is a bar at all.
    """

    def __init__(self, documents: object, *, show: bool) -> None:
        total = len(documents) if isinstance(documents, Sized) else None
        super().__init__(
            desc="Indexing",
            total=total,
            unit=" documents",
            mininterval=0,  # each chunk is shown: there are few
            miniters=1,
            disable=not show,
        )

    def show(self, done: IndexResult) -> None:
        """Say how far it is, and how many tokens a second were embedded."""
        seconds = self.format_dict["elapsed"]
        if done.tokens and seconds:
            self.set_postfix_str(f"{done.tokens / seconds:,.0f} tokens/s", refresh=False)
        self.update(done.added + done.skipped - self.n)

    def end(self, done: IndexResult) -> IndexResult:
        """Say what it came to."""
        if done.tokens:
            self.set_postfix_str(f"{done.tokens:,} tokens, {done.truncated:,} documents truncated")
        logger.info("Indexed: %s", done)
        return done
