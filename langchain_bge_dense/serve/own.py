"""Paths of our own: all three outputs, tokens, and what the server says of itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from langchain_bge_dense._engine.calls import check_text
from langchain_bge_dense._engine.encoding import MEDIA_TYPE, to_bytes
from langchain_bge_dense.serve import tei
from langchain_bge_dense.serve.service import EncodeRequest, refusal, service_of

if TYPE_CHECKING:
    from langchain_bge_dense._engine.encoding import M3Encoding

router = APIRouter(tags=["langchain-bge-dense"])


class TextRequest(BaseModel):
    """One text."""

    text: str


class WeightsRequest(BaseModel):
    """Lexical weights by token id."""

    weights: dict[Annotated[int, Field(ge=0, lt=1 << 32)], float]


@router.post("/encode")
async def encode(http: Request, asked: EncodeRequest) -> Response:
    """Compute any of the three outputs, as JSON or, to the last bit of float32, as safetensors."""
    packed = asked.encoding_format == "safetensors"
    [content] = await service_of(http).encode(
        http, asked, to_bytes if packed else _as_json, parts=1
    )
    return Response(content, media_type=MEDIA_TYPE if packed else "application/json")


def _as_json(encoding: M3Encoding) -> bytes:
    dense, colbert = encoding.dense, encoding.colbert
    return json.dumps(
        {
            "dense": None if dense is None else dense.tolist(),
            "lexical": encoding.lexical,
            "colbert": None if colbert is None else [vectors.tolist() for vectors in colbert],
            "token_counts": encoding.token_counts.tolist(),
            "truncated": encoding.truncated.tolist(),
        }
    ).encode()


@router.post("/tokenize")
def tokenize(http: Request, asked: TextRequest) -> list[tuple[int, int, int]]:
    """Tokens of a text, special ones left out: id, and where in the text it starts and ends."""
    embeddings = service_of(http).embeddings
    try:
        return embeddings.engine().token_spans(check_text(asked.text, 0))
    except ValueError as error:
        raise refusal(422, error) from error


@router.post("/tokens")
def tokens(http: Request, asked: WeightsRequest) -> dict[str, float]:
    """Lexical weights with token strings for keys, the largest first."""
    return service_of(http).embeddings.tokens(asked.weights)


@router.get("/info")
def info(http: Request) -> dict[str, Any]:
    """Describe the model and the server's settings and limits, for TEI's clients too."""
    service = service_of(http)
    return {**service.info(), **tei.info(service)}


@router.get("/health")
async def health() -> dict[str, str]:
    """Tell whether the server runs."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(http: Request) -> Response:
    """Answer 200 if the model is loaded, else 503."""
    return Response(status_code=200 if service_of(http).ready else 503)


@router.get("/metrics")
def metrics(http: Request) -> Response:
    """Requests, texts, tokens, the queue and latencies, for Prometheus."""
    content = generate_latest(service_of(http).registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)
