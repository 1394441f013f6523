"""A model behind HTTP: what callers may ask of it, their limits, and what is counted."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from langchain_bge_dense._engine.calls import Options
    from langchain_bge_dense._engine.outputs import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings

logger = logging.getLogger(__name__)

_COLBERT_SHARE = 64  # a text's ColBERT vectors are so many times as large as all else, and more
_RETRY_SECONDS = 1
_CHOICES = ("instruction", "max_length", "normalize", "on_truncate")


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
    """Of the checkpoint that it has to be."""
    pooling: str | None = None
    """The pooling that it has to have."""

    def options(self, embeddings: BGEM3Embeddings) -> Options:
        """The server's options, changed by what was given."""
        options = embeddings._options(query=self.query)  # noqa: SLF001
        if self.max_length is not None:
            embeddings._checkpoint().longest(self.max_length)  # noqa: SLF001
        given = {name: getattr(self, name) for name in _CHOICES if getattr(self, name) is not None}
        options = options._replace(paired=False, **given)
        return options if options.on_truncate == "raise" else options._replace(on_truncate="ignore")


class OpenAIRequest(BaseModel):
    """A request of OpenAI's embeddings API. The server has one model, whatever is named."""

    input: str | list[Any]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    input_type: Literal["document", "query"] = "document"
    """Not OpenAI's: which instruction of the server goes in front."""


class TextRequest(BaseModel):
    """One text."""

    text: str


class WeightsRequest(BaseModel):
    """Lexical weights by token id."""

    weights: dict[int, float]


class Service:
    """A model, the limits of its callers and what is counted of them."""

    def __init__(
        self, embeddings: BGEM3Embeddings, max_texts: int, max_body: int, max_queue: int
    ) -> None:
        self.embeddings = embeddings
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

    async def encode(self, http: Request, asked: EncodeRequest) -> M3Encoding:
        """The outputs asked for, unless the caller hangs up before they are there."""
        self._check_room(len(asked.texts), "colbert_texts" if asked.colbert else "texts")
        self._queued += 1
        try:
            encoding = await _unless_gone(http, self._encode(asked))
        except (TypeError, ValueError) as error:
            raise refusal(422, error) from error
        except (FloatingPointError, MemoryError, RuntimeError) as error:
            logger.exception("A request failed.")
            raise refusal(500, error) from error
        finally:
            self._queued -= 1
        self._texts.inc(len(encoding.token_counts))
        self._tokens.inc(int(encoding.token_counts.sum()))
        return encoding

    async def _encode(self, asked: EncodeRequest) -> M3Encoding:
        if not self.ready:
            await asyncio.to_thread(self.embeddings.load)
        self._check_model(asked)
        return await self.embeddings._loaded().aencode(  # noqa: SLF001
            asked.texts,
            asked.options(self.embeddings),
            first=asked.first,
            dense=asked.dense,
            lexical=asked.lexical,
            colbert=asked.colbert,
        )

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self.embeddings._engine is not None  # noqa: SLF001

    def info(self) -> dict[str, Any]:
        """What is served, and how."""
        embeddings = self.embeddings
        found = embeddings._checkpoint()  # noqa: SLF001
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
            "max_length": found.longest(embeddings.max_length),
            "limits": self.limits,
            "normalize": embeddings.normalize,
            "on_truncate": embeddings.on_truncate,
            "query_instruction": embeddings._instruction(query=True),  # noqa: SLF001
            "document_instruction": embeddings._instruction(query=False),  # noqa: SLF001
        }

    def _check_room(self, texts: int, limit: str) -> None:
        if texts > self.limits[limit]:
            msg = (
                f"{texts:,} texts are more than the {self.limits[limit]:,} that this server takes "
                "at once. Send them in parts."
            )
            raise refusal(413, ValueError(msg))
        if self._queued >= self.limits["queue"]:
            msg = (
                f"{self._queued:,} requests wait, as many as this server takes. "
                f"Try again in {_RETRY_SECONDS} s."
            )
            raise refusal(429, ConnectionError(msg), {"Retry-After": str(_RETRY_SECONDS)})

    def _check_model(self, asked: EncodeRequest) -> None:
        """Refuse who knows another model from before."""
        found = self.embeddings._checkpoint()  # noqa: SLF001
        served = {"digest": found.digest, "pooling": found.modules.pooling}
        for name, value in served.items():
            if getattr(asked, name) not in (None, value):
                msg = (
                    f"The server's model has changed: its {name} is {value!r}, not "
                    f"{getattr(asked, name)!r}. Make new embeddings, and compare fingerprints."
                )
                raise refusal(409, ValueError(msg))


async def _unless_gone(http: Request, work: Coroutine[Any, Any, M3Encoding]) -> M3Encoding:
    """The result of work that is cancelled when the caller hangs up."""
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
    """An answer from which `Client` raises the same error again."""
    return HTTPException(status, {"type": type(error).__name__, "message": str(error)}, headers)
