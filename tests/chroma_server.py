"""A real Chroma server on loopback, which can be killed and comes back on its folder and port."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

_RUN = "from chromadb.cli.cli import app; app()"
_START_SECONDS = 30.0


class ChromaServer:
    """The server that `chroma run` starts.

    >>> with ChromaServer(folder) as server:
    ...     store = open_chroma(embeddings, host=server.host, port=server.port)
    ...     server.stop()
    ...     server.start()

    Args:
        folder: Where it keeps its data and its log.
    """

    host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-c", _RUN, "run", "--host", self.host, "--port", str(self.port)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--path", str(self.folder / "data")], stdout=log, stderr=log
            )
        self._wait(time.monotonic() + _START_SECONDS)

    def stop(self) -> None:
        """Kill it: no chance to save anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait(self, until: float) -> None:
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                log = (self.folder / "server.log").read_text()
                msg = f"The Chroma server did not start:\n{log}"
                raise RuntimeError(msg)
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            address = f"http://{self.host}:{self.port}/api/v2/heartbeat"
            return httpx.get(address, trust_env=False).is_success
        except httpx.TransportError:
            return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ChromaServer.host, 0))
        return listener.getsockname()[1]
