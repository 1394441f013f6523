"""`create_app`: the ASGI application, who may call it, errors; `serve_deployment`: on Ray Serve."""

from __future__ import annotations

import secrets
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from langchain_bge_dense._extras import needs
from langchain_bge_dense.serve import ollama, openai, own, rerank, tei
from langchain_bge_dense.serve.service import Service, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from langchain_bge_dense.embeddings import BGEM3Embeddings

TEXTS, BODY, QUEUE = 2_048, 1 << 25, 256
"""Default limits of a request's texts and bytes, and of requests that wait or run."""

_OPEN_PATHS = ("/health", "/ready", "/docs", "/openapi.json")  # without the API key
_PLAIN_PATHS = ("/api/", "/embed", "/similarity")  # of Ollama and TEI: errors are strings
_APP_OPTIONS = ("api_key", "max_texts", "max_body", "max_queue", "aliases")


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
                msg = "Missing or invalid API key. Pass the server's as api_key."
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


def _refused(http: Request, error: Exception) -> JSONResponse:
    """Shape an error as the clients of a path read it."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these alone
    detail: Any = error.detail
    if not isinstance(detail, dict):
        detail = {"type": "HTTPException", "message": detail}
    if http.url.path == "/" or http.url.path.startswith(_PLAIN_PATHS):
        content = {"error": detail["message"], "error_type": detail["type"]}
    else:
        content = {"error": detail}
    return JSONResponse(content, error.status_code, error.headers)


def _malformed(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    msg = f"The request's {field or 'body'} is wrong: {first['msg']}. Correct it; see /docs."
    return _refused(http, refusal(422, ValueError(msg)))


def _failed(http: Request, error: Exception) -> JSONResponse:
    msg = f"The server failed with {type(error).__name__}. Its log has the traceback."
    return _refused(http, refusal(500, RuntimeError(msg)))


def create_app(  # noqa: PLR0913
    embeddings: BGEM3Embeddings,
    *,
    api_key: str | None = None,
    max_texts: int = TEXTS,
    max_body: int = BODY,
    max_queue: int = QUEUE,
    aliases: Sequence[str] = (),
) -> FastAPI:
    """Make an ASGI application over one model, for one process of any ASGI server.

    Args:
        embeddings: The model; loaded with the first request where `load` was not called.
        api_key: Key that callers must send; without one, anyone may call.
        max_texts: Texts that are encoded at once, with ColBERT vectors 1/64 of them. A request of
            `BGEM3Embeddings` has no more; those of other clients run in up to 32 parts.
        max_body: Bytes of one request.
        max_queue: Requests that wait or run; more are refused for the moment.
        aliases: Names of models that clients may ask for beside the model's own.

    Returns:
        The application, with its OpenAPI page at `/docs`.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> app = create_app(BGEM3Embeddings(model=checkpoint))
        >>> app.openapi()["info"]["title"]
        'BGE-M3'
    """
    app = FastAPI(title="BGE-M3", version=version("langchain-bge-dense"), redoc_url=None)
    app.state.service = Service(embeddings, max_texts, max_body, max_queue, aliases)
    for schema in (own, openai, rerank, tei, ollama):
        app.include_router(schema.router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(_Entrance, service=app.state.service, api_key=api_key)
    return app


def serve_deployment(embeddings: BGEM3Embeddings, **options: Any) -> Any:
    """Make a deployment of Ray Serve of the same application, for many machines and GPUs.

    Needs the extra `ray`, too. Each replica loads the model from the settings of `embeddings`.

    Args:
        embeddings: The settings of the model.
        options: Those of `create_app`; all others are for `ray.serve.deployment`, such as
            `num_replicas`, `autoscaling_config` and `ray_actor_options={"num_gpus": 1}`.

    Returns:
        What `ray.serve.run` takes.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> served = serve_deployment(BGEM3Embeddings(model=checkpoint), num_replicas=2)
    """
    with needs("ray", "serve_deployment"):
        from ray import serve

    ours = {name: options.pop(name) for name in _APP_OPTIONS if name in options}

    def build() -> FastAPI:
        return create_app(embeddings.load(), **ours)

    options.setdefault("max_ongoing_requests", ours.get("max_queue", QUEUE))
    return serve.deployment(**options)(serve.ingress(build)()).bind()
