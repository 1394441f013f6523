"""`Client`: an engine on a server of `langchain_bge_dense.serve`, asked over HTTP. No torch.

One thread of this process runs an event loop for all calls to servers, synchronous ones included:
what is cancelled there hangs up, and the server drops the texts that have not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
)

from langchain_bge_dense._engine.calls import BaseEngine, check_text, result, windows
from langchain_bge_dense._engine.checkpoint import Checkpoint
from langchain_bge_dense._engine.encoding import encoding_of, from_bytes
from langchain_bge_dense._engine.modules import Modules, Prompts
from langchain_bge_dense._engine.process import forkable_lock
from langchain_bge_dense._retries import given_up

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from langchain_bge_dense._engine.calls import Options
    from langchain_bge_dense._engine.encoding import M3Encoding, Outputs

logger = logging.getLogger(__name__)

_UNIX = "unix://"
_CONNECTIONS = 64
_CONNECT_SECONDS = 5.0
_KEEP_SECONDS = 30.0  # a connection without requests
_FIRST_SECONDS = 5.0  # for a server that never answered, and may not be one
_PATIENCE_SECONDS = 60.0  # for one that did, and may be starting anew
_FRAME_BYTES = 64  # of a body, around its settings and its texts

_ERRORS = {
    kind.__name__: kind
    for kind in (
        ConnectionError,
        FloatingPointError,
        MemoryError,
        PermissionError,
        RuntimeError,
        TypeError,
        ValueError,
    )
}
_CONFLICT = 409  # its model is another one than before
_AWAY = (502, 503, 504)  # said by what stands before a server that is not there
_TEMPORARY = (
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.TimeoutException,
    httpx.HTTPStatusError,  # of a server that is not there
)
_FACTS = ("name", "digest", "has_heads", "dimension", "positions")
_PLACES = ("folder", "pooling", "query_instruction", "document_instruction", "limits")

# The system notices a machine that went away without a word, during a call of any length.
_ALIVE = [
    (getattr(socket, level), getattr(socket, option), value)
    for level, option, value in (
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 15),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 5),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 6),
    )
    if hasattr(socket, option)
]


@dataclass(eq=False)
class Post:
    """A window of texts that was sent to the server.

    Attributes:
        bodies: Of HTTP requests, each as large as the server takes, and its number of texts.
        future: Gives their replies; cancelling it hangs up.
        finished: Texts whose replies are there.
        process: Whose thread sends them.
    """

    bodies: list[tuple[bytes, int]]
    future: Future[list[bytes]] = field(default_factory=Future)
    finished: int = 0
    process: int = field(default_factory=os.getpid)


class Client(BaseEngine):
    """A loaded model on a server.

    Args:
        base_url: `http://host:port`, or `unix:///path` of a socket.
        api_key: Sent with every request.
    """

    # Smaller than in one process: a reply is a unit of progress, and of what a retry repeats.
    window = 256
    colbert_window = 32

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self._url = base_url
        self._settings = (base_url, api_key)
        self._patience = _FIRST_SECONDS
        self._is_away = False
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._https: dict[int, httpx.AsyncClient] = {}  # by process: a child has none of its own
        weakref.finalize(self, _close, self._https).atexit = False

    @cached_property
    def _info(self) -> dict[str, Any]:
        content = _run(self._ask("GET", "/info"))
        with contextlib.suppress(ValueError):
            info = json.loads(content)
            if isinstance(info, dict) and info.keys() >= {*_FACTS, *_PLACES}:
                return info
        raise self._another_server(200, content.decode(errors="replace"))

    @cached_property
    def checkpoint(self) -> Checkpoint:  # type: ignore[override]
        """The checkpoint that the server serves."""
        info = self._info
        facts = {name: info[name] for name in _FACTS}
        prompts = Prompts(info["query_instruction"], info["document_instruction"])
        modules = Modules(info["pooling"], prompts=prompts)
        return Checkpoint(Path(info["folder"]), **facts, modules=modules)

    def request(self, texts: list[str], first: int, outputs: Outputs, options: Options) -> Post:
        """Build the HTTP requests for a window of texts."""
        settings = {
            "query": options.urgent,
            "dense": outputs.dense,
            "lexical": outputs.lexical,
            "colbert": outputs.colbert,
            "instruction": options.instruction,
            "max_length": options.max_length,
            "normalize": options.normalize,
            "on_truncate": "raise" if options.on_truncate == "raise" else "ignore",
            "encoding_format": "safetensors",
            "digest": self.checkpoint.digest,
            "pooling": self.checkpoint.modules.pooling,
        }
        limits = self._info["limits"]
        most = limits["colbert_texts" if outputs.colbert else "texts"]
        head = json.dumps(settings).encode()[:-1]
        quoted = [json.dumps(text, ensure_ascii=False).encode() for text in texts]
        room = limits["body"] - len(head) - _FRAME_BYTES
        bodies = []
        for group in windows(quoted, lambda text: len(text) + 1, room, most):
            body = b'%b, "first": %d, "texts": [%b]}' % (head, first, b",".join(group))
            bodies.append((body, len(group)))
            first += len(group)
        return Post(bodies)

    def enqueue(self, request: Post) -> None:
        """Send a request."""
        request.future = asyncio.run_coroutine_threadsafe(self._send(request), _event_loop())

    async def _send(self, request: Post) -> list[bytes]:
        replies = []
        for body, count in request.bodies:
            replies.append(await self._ask("POST", "/encode", body))
            request.finished += count
        return replies

    def encoding(self, requests: Sequence[Post], outputs: Outputs, options: Options) -> M3Encoding:
        """Join the replies to requests."""
        if requests:
            return from_bytes([reply for request in requests for reply in request.future.result()])
        return encoding_of(
            [],
            [],
            outputs,
            dimension=self.checkpoint.dimension,
            max_length=options.max_length,
            unweighted=np.zeros(0, np.int32),
            normalize=options.normalize,
        )

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, without special ones."""
        return len(self.token_spans(check_text(text, 0)))

    def token_strings(self, weights: dict[int, float]) -> dict[str, float]:
        """Spell the tokens of lexical weights, the largest weight first."""
        named: dict[str, float] = self._answer("/tokens", {"weights": weights})
        return named

    def token_spans(self, text: str) -> list[tuple[int, int, int]]:
        """List the tokens of a text in order: id, start and end."""
        return [tuple(span) for span in self._answer("/tokenize", {"text": text})]

    def _answer(self, path: str, question: dict[str, Any]) -> Any:
        return json.loads(_run(self._ask("POST", path, json.dumps(question).encode())))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Request a reply, retry without an answer, and raise the errors of the server's engine."""
        try:
            return await self._retrying()(self._ask_once, method, path, body)
        except httpx.NetworkError as error:  # that is not temporary
            msg = (
                f"{self._url} cannot be asked over TLS: {error}. Write http:// for a server "
                "without a certificate, or name the file of its authority in SSL_CERT_FILE."
            )
            raise ConnectionError(msg) from error

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(_is_temporary),
            wait=wait_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(self._patience),
            before_sleep=partial(Client._log_away, weakref.proxy(self)),  # a cycle would keep it
            retry_error_callback=given_up(
                self._url,
                "Start the server with python -m langchain_bge_dense.serve, or correct base_url.",
            ),
        )

    def _log_away(self, state: RetryCallState) -> None:
        """Log once that the server does not answer, however many calls wait for it."""
        if state.outcome is not None and not self._is_away:
            self._is_away = True
            logger.warning(
                "%s does not answer, and is asked again for %.0f s: %r",
                self._url,
                self._patience,
                state.outcome.exception(),
            )

    async def _ask_once(self, method: str, path: str, body: bytes | None) -> bytes:
        response = await self._http().request(method, path, content=body)
        if response.status_code in _AWAY or _is_lost(response):
            response.raise_for_status()
        self._patience, self._is_away = _PATIENCE_SECONDS, False
        if response.status_code == _CONFLICT:
            with _lock:  # new embeddings ask it anew what it has
                _clients.pop(self._settings, None)
        if not response.is_success:
            raise self._error(response)
        return response.content

    def _error(self, response: httpx.Response) -> Exception:
        """Rebuild the error that the server raised, or make one for a server of another kind."""
        try:
            error = response.json()["error"]
            return _ERRORS[error["type"]](error["message"])
        except (ValueError, KeyError, TypeError):
            return self._another_server(response.status_code, response.text)

    def _another_server(self, status: int, answer: str) -> RuntimeError:
        msg = (
            f"{self._url} is not a server of langchain_bge_dense.serve: it answered {status} "
            f"{answer[:200]!r}. Correct base_url; other servers, such as Chroma's, have port 8000 "
            "by default, too."
        )
        return RuntimeError(msg)

    def _http(self) -> httpx.AsyncClient:
        """Open this process's connections; call it in their event loop alone."""
        if os.getpid() not in self._https:
            unix = self._url.startswith(_UNIX)
            self._https[os.getpid()] = httpx.AsyncClient(
                base_url="http://localhost" if unix else self._url,
                headers=self._headers | {"Content-Type": "application/json"},
                timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
                transport=httpx.AsyncHTTPTransport(
                    verify=self._certificates(),
                    uds=self._url.removeprefix(_UNIX) if unix else None,
                    limits=httpx.Limits(
                        max_connections=_CONNECTIONS, keepalive_expiry=_KEEP_SECONDS
                    ),
                    socket_options=None if unix else _ALIVE,
                ),
            )
        return self._https[os.getpid()]

    def _certificates(self) -> ssl.SSLContext | bool:
        """Read certificates to check the server by, if it uses TLS."""
        if not self._url.startswith("https://"):
            return False
        try:
            return httpx.create_ssl_context()
        except OSError as error:
            file = os.environ.get("SSL_CERT_FILE")
            msg = (
                f"The certificates to check {self._url} by cannot be read: {error}. "
                f"SSL_CERT_FILE is {file!r}: name a file of certificates there, or unset it."
            )
            raise ConnectionError(msg) from error


def _is_temporary(error: BaseException) -> bool:
    """Tell whether another attempt may succeed, which it cannot after a TLS failure."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        if isinstance(cause, ssl.SSLError):
            return isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))  # hung up
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, _TEMPORARY)


def _is_lost(response: httpx.Response) -> bool:
    """Recognize Ray Serve's report of a dead replica; the application's own failures are JSON."""
    kind = response.headers.get("content-type", "")
    return response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and "json" not in kind


_clients: weakref.WeakValueDictionary[tuple[str, str | None], Client] = (
    weakref.WeakValueDictionary()
)
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process, as a thread is of one alone
_lock = forkable_lock()


def shared_client(base_url: str, api_key: str | None) -> Client:
    """Get the client of these settings, one in each process."""
    with _lock:
        client = _clients.get((base_url, api_key))
        if client is None:
            client = _clients[base_url, api_key] = Client(base_url, api_key)
        return client


def _event_loop() -> asyncio.AbstractEventLoop:
    """Start the event loop of this process, in a thread of its own."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="bge-m3-client", daemon=True).start()
        return loop


def _run(work: Coroutine[Any, Any, bytes]) -> bytes:
    future = asyncio.run_coroutine_threadsafe(work, _event_loop())
    try:
        return result(future)
    finally:
        future.cancel()


def _close(https: dict[int, httpx.AsyncClient]) -> None:
    """Close the connections of this process, but not those of its parent."""
    http, loop = https.get(os.getpid()), _loops.get(os.getpid())
    if http is not None and loop is not None:
        loop.call_soon_threadsafe(lambda: loop.create_task(http.aclose()))
