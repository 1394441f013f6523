"""A model behind HTTP: its names, what callers may ask, in parts, their limits, what is counted."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import HTTPException, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._engine.calls import Options
    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PARTS = 32  # of a request; the reply to short texts is a thousand times as large as they are
_FAMILY = "bge-m3"  # a name of every checkpoint with its heads
_COLBERT_SHARE = 64  # a text's ColBERT vectors are so many times as large as all else, and more
_RETRY_SECONDS = 1
_CHOICES = ("instruction", "max_length", "normalize", "on_truncate")


Purpose = Literal["query", "search_query", "document", "search_document", "passage"]
"""Names that clients give the two kinds of text, each with an instruction of the server."""


class EncodeRequest(BaseModel):
    """Texts and what to compute; what is None is as the server was told."""

    model_config = ConfigDict(extra="forbid")

    texts: list[Any]
    query: bool = False
    """A query, not documents: it goes before them, and has the server's `query_instruction`."""
    dense: bool = True
    lexical: bool = False
    colbert: bool = False
    instruction: str | None = None
    max_length: Annotated[int, Field(ge=3)] | None = None
    normalize: bool | None = None
    on_truncate: Literal["raise", "ignore"] | None = None
    encoding_format: Literal["json", "safetensors"] = "json"
    first: int = 0
    """Index of the first text, for errors."""
    digest: str | None = None
    """Required fingerprint of the checkpoint."""
    pooling: str | None = None
    """Required pooling."""

    def options(self, embeddings: BGEM3Embeddings) -> Options:
        """Apply the request's options to the server's."""
        session = embeddings.session()
        options = session.queries if self.query else session.documents
        if self.max_length is not None:
            session.checkpoint.longest(self.max_length)
        given = {name: getattr(self, name) for name in _CHOICES if getattr(self, name) is not None}
        options = options._replace(**given)
        return options if options.on_truncate == "raise" else options._replace(on_truncate="ignore")


class Service:
    """A model, the limits of its callers and what is counted of them."""

    def __init__(
        self,
        embeddings: BGEM3Embeddings,
        max_texts: int,
        max_body: int,
        max_queue: int,
        aliases: Sequence[str] = (),
    ) -> None:
        self.embeddings = embeddings
        self._aliases = aliases
        self.limits = {
            "texts": max_texts,
            "colbert_texts": max(1, max_texts // _COLBERT_SHARE),
            "body": max_body,
            "queue": max_queue,
        }
        self.registry = CollectorRegistry()
        self._queued = 0
        names: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("bge_m3_requests", "Requests", ["path", "status"], **names)
        self.seconds = Histogram("bge_m3_request_seconds", "Time to reply", ["path"], **names)
        self._texts = Counter("bge_m3_texts", "Texts encoded", **names)
        self._tokens = Counter("bge_m3_tokens", "Tokens of these texts", **names)
        queue = Gauge("bge_m3_queue", "Requests that wait or run", **names)
        queue.set_function(lambda: self._queued)

    @property
    def names(self) -> list[str]:
        """Names of the model: the checkpoint's, `bge-m3` where it has the heads, aliases."""
        found = self.embeddings.session().checkpoint
        family = [_FAMILY] if found.has_heads else []
        return list(dict.fromkeys([found.name, *family, *self._aliases]))

    @property
    def max_length(self) -> int:
        """Tokens that a text is cut to, unless a caller asks for fewer."""
        return self.embeddings.session().documents.max_length

    def at_most(self, tokens: int | None) -> int | None:
        """Limit the tokens of a text by the request's number and by the server's."""
        return None if tokens is None else min(tokens, self.max_length)

    async def check(self, model: str | None, dimensions: int | None = None) -> None:
        """Check that a client requests this model and its number of dimensions."""
        with self._turn():
            await self._load()
        if model and _plain(model) not in map(_plain, self.names):
            msg = (
                f"This server serves {' or '.join(map(repr, self.names))}, not {model!r}. "
                "Request that model, or start the server with the other name as --alias."
            )
            raise refusal(404, ValueError(msg))
        if dimensions not in (None, self.embeddings.dimension):
            msg = (
                f"{self.names[0]!r} has {self.embeddings.dimension:,} dimensions, not "
                f"{dimensions:,}. Leave dimensions out."
            )
            raise refusal(422, ValueError(msg))

    async def encode(
        self,
        http: Request,
        asked: EncodeRequest,
        render: Callable[[M3Encoding], T],
        *,
        parts: int = _PARTS,
    ) -> list[T]:
        """Render the outputs asked for, part by part, unless the caller hangs up meanwhile.

        `render` is called with the outputs of each part, in a thread, before the next is computed.
        """
        size = self.limits["colbert_texts" if asked.colbert else "texts"]
        if len(asked.texts) > parts * size:
            msg = (
                f"{len(asked.texts):,} texts are more than the {parts * size:,} that this server "
                "takes at once. Send them in parts."
            )
            raise refusal(413, ValueError(msg))
        with self._turn():
            try:
                return await _unless_gone(http, self._rendered(asked, size, render))
            except (TypeError, ValueError) as error:
                raise refusal(422, error) from error
            except (FloatingPointError, MemoryError, RuntimeError) as error:
                logger.exception("A request failed.")
                raise refusal(500, error) from error

    async def dense(
        self, http: Request, asked: EncodeRequest, write: Callable[[NDArray[np.float32]], str]
    ) -> tuple[list[str], int]:
        """Write the dense vectors of texts as JSON, and count the tokens."""

        def render(encoding: M3Encoding) -> tuple[list[str], int]:
            vectors = [write(vector) for vector in encoding.dense]  # type: ignore[union-attr]
            return vectors, int(encoding.token_counts.sum())

        parts = await self.encode(http, asked, render)
        return [vector for part, _ in parts for vector in part], sum(count for _, count in parts)

    async def _rendered(
        self, asked: EncodeRequest, size: int, render: Callable[[M3Encoding], T]
    ) -> list[T]:
        rendered = []
        for first in range(0, max(1, len(asked.texts)), size):  # no texts are a part, too
            texts = asked.texts[first : first + size]
            part = asked.model_copy(update={"texts": texts, "first": asked.first + first})
            rendered.append(await asyncio.to_thread(render, await self._encode(part)))
        return rendered

    async def _load(self) -> None:
        if not self.ready:
            await asyncio.to_thread(self.embeddings.load)

    async def _encode(self, asked: EncodeRequest) -> M3Encoding:
        await self._load()
        self._check_model(asked)
        encoding = await self.embeddings.engine().aencode(
            asked.texts,
            asked.options(self.embeddings),
            first=asked.first,
            dense=asked.dense,
            lexical=asked.lexical,
            colbert=asked.colbert,
        )
        self._texts.inc(len(encoding.token_counts))
        self._tokens.inc(int(encoding.token_counts.sum()))
        return encoding

    @property
    def ready(self) -> bool:
        """Tell whether the model is loaded."""
        return self.embeddings._engine is not None  # noqa: SLF001

    def info(self) -> dict[str, Any]:
        """Describe the model and the settings of the server."""
        embeddings = self.embeddings
        found, documents, queries = embeddings.session()
        return {
            "version": version("langchain-bge-dense"),
            "fingerprint": embeddings.fingerprint,
            "name": found.name,
            "folder": str(found.folder),
            "digest": found.digest,
            "pooling": found.modules.pooling,
            "has_heads": found.has_heads,
            "dimension": found.dimension,
            "positions": found.positions,
            "max_length": documents.max_length,
            "limits": self.limits,
            "normalize": embeddings.normalize,
            "on_truncate": embeddings.on_truncate,
            "query_instruction": queries.instruction,
            "document_instruction": documents.instruction,
        }

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Count a request that waits or runs, if there is room for one more."""
        if self._queued >= self.limits["queue"]:
            msg = (
                f"The queue is full: {self._queued:,} requests wait. "
                f"Try again in {_RETRY_SECONDS} s."
            )
            raise refusal(429, ConnectionError(msg), {"Retry-After": str(_RETRY_SECONDS)})
        self._queued += 1
        try:
            yield
        finally:
            self._queued -= 1

    def _check_model(self, asked: EncodeRequest) -> None:
        """Reject a client that was created for a different model."""
        found = self.embeddings.session().checkpoint
        served = {"digest": found.digest, "pooling": found.modules.pooling}
        for name, value in served.items():
            if getattr(asked, name) not in (None, value):
                msg = (
                    f"The server's model has changed: its {name} is {value!r}, not "
                    f"{getattr(asked, name)!r}. Make new embeddings, and compare fingerprints."
                )
                raise refusal(409, ValueError(msg))


def is_query(purpose: Purpose | None) -> bool:
    """Tell whether a text is a query; the default is a document."""
    return purpose in ("query", "search_query")


def on_truncate(truncate: bool | None) -> Literal["raise", "ignore"] | None:
    """Translate whether a client lets longer texts be cut."""
    return None if truncate is None else "ignore" if truncate else "raise"


def floats(vector: NDArray[np.float32]) -> str:
    """Write a vector as a JSON list."""
    return json.dumps(vector.tolist())


def json_reply(content: str) -> Response:
    """Make a reply of JSON that is written already."""
    return Response(content, media_type="application/json")


def service_of(http: Request) -> Service:
    """Look up the service behind a request's application."""
    service: Service = http.app.state.service
    return service


def _plain(name: str) -> str:
    """Strip owner, tag and case from a model's name.

    >>> _plain("BAAI/BGE-M3"), _plain("bge-m3:567m")
    ('bge-m3', 'bge-m3')
    """
    return name.rpartition("/")[2].partition(":")[0].lower()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and cancel it when the caller hangs up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "The caller hung up.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def refusal(status: int, error: Exception, headers: dict[str, str] | None = None) -> HTTPException:
    """Make a reply from which `Client` raises the same error again."""
    return HTTPException(status, {"type": type(error).__name__, "message": str(error)}, headers)
