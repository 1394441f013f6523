"""Servers of `langchain_bge_dense.serve`: in a thread, to look into; in a process, to kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from langchain_bge_dense.serve import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from langchain_bge_dense import BGEM3Embeddings

HOST = "127.0.0.1"
START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


@contextmanager
def served(
    embeddings: BGEM3Embeddings, *, uds: Path | None = None, **options: Any
) -> Iterator[str]:
    """A server in a thread of this process; gives its base_url."""
    place = {"uds": str(uds)} if uds else {"host": HOST, "port": free_port()}
    app = create_app(embeddings, **options)
    server = uvicorn.Server(uvicorn.Config(app, **place, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"unix://{uds}" if uds else f"http://{HOST}:{place['port']}"
    finally:
        server.should_exit = True
        thread.join()


class ModelServer:
    """What `python -m langchain_bge_dense.serve` starts.

    >>> with ModelServer(folder, "--model", checkpoint) as server:
    ...     BGEM3Embeddings(base_url=server.base_url).embed_query("free")
    ...     server.kill()
    ...     server.start()

    Args:
        folder: Where its log is kept.
        options: Of its command line.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.log = folder / "server.log"
        self.port = free_port()
        self.base_url = f"http://{HOST}:{self.port}"
        module = [sys.executable, "-m", "langchain_bge_dense.serve"]
        self._command = [*module, "--port", str(self.port), *options]
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until its model is loaded."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        until = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                msg = f"The server did not start:\n{self.log.read_text()}"
                raise RuntimeError(msg)
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/ready", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def terminate(self) -> None:
        """Ask it to finish what runs, and to end."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
