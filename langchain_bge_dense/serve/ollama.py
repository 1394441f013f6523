"""Ollama's paths: dense vectors, and which model there is."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from langchain_bge_dense.serve.service import (
    EncodeRequest,
    floats,
    json_reply,
    on_truncate,
    service_of,
)

router = APIRouter(tags=["Ollama"])


class OllamaOptions(BaseModel):
    """The one option of Ollama that changes an embedding; others are for texts that it writes."""

    num_ctx: Annotated[int, Field(ge=3)] | None = None
    """Tokens that a text is cut to, where the server's `max_length` is not less."""


class PromptRequest(BaseModel):
    """A request of Ollama's earlier API: one text."""

    prompt: str
    model: str | None = None
    options: OllamaOptions | None = None


class InputRequest(BaseModel):
    """A request of Ollama's embed API; without input it loads the model."""

    input: str | list[Any] | None = None
    model: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: OllamaOptions | None = None


@router.post("/api/embed")
async def embed(http: Request, asked: InputRequest) -> Response:
    """Dense vectors."""
    start, service = time.perf_counter_ns(), service_of(http)
    await service.check(asked.model, asked.dimensions)
    loaded = time.perf_counter_ns()
    texts = [asked.input] if isinstance(asked.input, str) else asked.input or []
    vectors, tokens = await _vectors(http, texts, asked.options, asked.truncate)
    facts = {
        "model": service.names[0],
        "total_duration": time.perf_counter_ns() - start,
        "load_duration": loaded - start,
        "prompt_eval_count": tokens,
    }
    return json_reply(f'{json.dumps(facts)[:-1]}, "embeddings": [{", ".join(vectors)}]}}')


@router.post("/api/embeddings")
async def embeddings(http: Request, asked: PromptRequest) -> Response:
    """Embed one text."""
    await service_of(http).check(asked.model)
    [vector], _ = await _vectors(http, [asked.prompt], asked.options)
    return json_reply(f'{{"embedding": {vector}}}')


async def _vectors(
    http: Request, texts: list[Any], options: OllamaOptions | None, truncate: bool | None = None
) -> tuple[list[str], int]:
    service = service_of(http)
    longest = service.at_most(options.num_ctx if options else None)
    wanted = EncodeRequest(texts=texts, max_length=longest, on_truncate=on_truncate(truncate))
    return await service.dense(http, wanted, floats)


@router.get("/api/tags")
def tags(http: Request) -> dict[str, Any]:
    """List the names that the one model answers to."""
    service = service_of(http)
    digest = service.embeddings.session().checkpoint.digest
    names = [f"{name}:latest" for name in service.names]
    return {"models": [{"name": name, "model": name, "digest": digest} for name in names]}


@router.get("/api/version")
def version_() -> dict[str, str]:
    """Answer with the version of this package."""
    return {"version": version("langchain-bge-dense")}
