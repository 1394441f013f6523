"""`create_app`: the ASGI application, its paths and who may call them."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from langchain_bge_dense._engine.calls import check_text
from langchain_bge_dense._engine.wire import MEDIA_TYPE, pack
from langchain_bge_dense.serve.service import (
    EncodeRequest,
    OpenAIRequest,
    Service,
    TextRequest,
    WeightsRequest,
    refusal,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from langchain_bge_dense._engine.outputs import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings

TEXTS, BODY, QUEUE = 2_048, 1 << 25, 256
"""Default limits of a request's texts and bytes, and of requests that wait or run."""

_OPEN_PATHS = ("/health", "/ready", "/docs", "/openapi.json")  # without the API key


router = APIRouter()


def _service(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


@router.post("/encode")
async def encode(http: Request, asked: EncodeRequest) -> Response:
    """Any of the three outputs; as JSON, or as safetensors with float32 to the last bit."""
    encoding = await _service(http).encode(http, asked)
    if asked.encoding_format == "safetensors":
        return Response(await asyncio.to_thread(pack, encoding), media_type=MEDIA_TYPE)
    return Response(await asyncio.to_thread(_as_json, encoding), media_type="application/json")


def _as_json(encoding: M3Encoding) -> str:
    dense, colbert = encoding.dense, encoding.colbert
    return json.dumps(
        {
            "dense": None if dense is None else dense.tolist(),
            "lexical": encoding.lexical,
            "colbert": None if colbert is None else [vectors.tolist() for vectors in colbert],
            "token_counts": encoding.token_counts.tolist(),
            "truncated": encoding.truncated.tolist(),
        }
    )


@router.post("/v1/embeddings")
async def openai_embeddings(http: Request, asked: OpenAIRequest) -> Response:
    """Dense vectors by OpenAI's schema."""
    service = _service(http)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if texts and isinstance(texts[0], (int, list)):
        msg = (
            "input has token ids, which are of another model's tokenizer. Send strings; "
            "langchain_openai.OpenAIEmbeddings does so with check_embedding_ctx_length=False."
        )
        raise refusal(422, ValueError(msg))
    name, dimension = service.embeddings._checkpoint().name, service.embeddings.dimension  # noqa: SLF001
    if asked.dimensions not in (None, dimension):
        msg = (
            f"{name!r} has {dimension:,} dimensions, not {asked.dimensions:,}. "
            "Leave dimensions out."
        )
        raise refusal(422, ValueError(msg))
    query = asked.input_type == "query"
    encoding = await service.encode(http, EncodeRequest(texts=texts, query=query))
    content = await asyncio.to_thread(_as_openai, encoding, name, asked.encoding_format)
    return Response(content, media_type="application/json")


def _as_openai(encoding: M3Encoding, model: str, encoding_format: str) -> str:
    vectors: list[Any] = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if encoding_format == "base64"
        else vector.tolist()
        for vector in encoding.dense  # type: ignore[union-attr]
    ]
    tokens = int(encoding.token_counts.sum())
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage})


@router.post("/tokenize")
def tokenize(http: Request, asked: TextRequest) -> list[tuple[int, int, int]]:
    """Tokens of a text, special ones left out: id, and where in the text it starts and ends."""
    embeddings = _service(http).embeddings
    try:
        return embeddings._loaded().token_spans(check_text(asked.text, 0))  # noqa: SLF001
    except ValueError as error:
        raise refusal(422, error) from error


@router.post("/tokens")
def tokens(http: Request, asked: WeightsRequest) -> dict[str, float]:
    """Lexical weights with token strings for keys, the largest first."""
    return _service(http).embeddings.tokens(asked.weights)


@router.get("/info")
def info(http: Request) -> dict[str, Any]:
    """The model, its fingerprint and dimension, the server's settings and limits."""
    return _service(http).info()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the server runs."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(http: Request) -> Response:
    """Whether the model is loaded: 200, or 503."""
    return Response(status_code=200 if _service(http).ready else 503)


@router.get("/metrics")
def metrics(http: Request) -> Response:
    """Requests, texts, tokens, the queue and latencies, for Prometheus."""
    content = generate_latest(_service(http).registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


class _Entrance:
    """Checks the API key, bounds the body and counts, before anything is read."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self._app = app
        self._service = service
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self._may_enter(scope):
                await self._app(scope, self._bounded(receive), noted)
            else:
                msg = "The API key is missing or another one. Give the server's as api_key."
                answer = _refused(Request(scope), refusal(401, PermissionError(msg)))
                await answer(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "")
            self._service.requests.labels(path, status).inc()
            self._service.seconds.labels(path).observe(time.perf_counter() - start)

    def _may_enter(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._key is None or path in _OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._key)

    def _bounded(self, receive: Receive) -> Receive:
        limit, read = self._service.limits["body"], 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                msg = (
                    f"The request is larger than the {limit:,} bytes that this server takes. "
                    "Send fewer or shorter texts at once, or start it with a larger --max-body."
                )
                raise refusal(413, ValueError(msg))
            return message

        return bounded


def _refused(_http: Request, error: Exception) -> JSONResponse:
    """What OpenAI's clients, and ours, read errors from."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these alone
    detail: Any = error.detail
    if not isinstance(detail, dict):
        detail = {"type": "HTTPException", "message": detail}
    return JSONResponse({"error": detail}, error.status_code, error.headers)


def _malformed(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    msg = f"The request's {place or 'body'} is wrong: {first['msg']}. Correct it; see /docs."
    return _refused(http, refusal(422, ValueError(msg)))


def _failed(http: Request, error: Exception) -> JSONResponse:
    msg = f"The server failed: {type(error).__name__}. Its log says where."
    return _refused(http, refusal(500, RuntimeError(msg)))


def create_app(
    embeddings: BGEM3Embeddings,
    *,
    api_key: str | None = None,
    max_texts: int = TEXTS,
    max_body: int = BODY,
    max_queue: int = QUEUE,
) -> FastAPI:
    """An ASGI application over one model, for any ASGI server, one process of it.

    Args:
        embeddings: The model; loaded with the first request where `load` was not called.
        api_key: That callers must send; None: anyone may call.
        max_texts: Texts of one request; one that asks for ColBERT vectors may have 1/64 of them.
        max_body: Bytes of one request.
        max_queue: Requests that wait or run; more are refused for the moment.

    Returns:
        The application, with its OpenAPI page at `/docs`.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> app = create_app(BGEM3Embeddings(model=checkpoint))
        >>> app.openapi()["info"]["title"]
        'BGE-M3'
    """
    app = FastAPI(title="BGE-M3", version=version("langchain-bge-dense"), redoc_url=None)
    app.state.service = Service(embeddings, max_texts, max_body, max_queue)
    app.include_router(router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(_Entrance, service=app.state.service, api_key=api_key)
    return app
