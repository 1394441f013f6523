"""Kill a process in the middle of its work."""

from __future__ import annotations

import os
import signal

from chromadb.api.client import Client
from chromadb.api.models.Collection import Collection

_CLASSES = {"Collection": Collection, "Client": Client}


def kill_at(kind: str, name: str, call: str) -> None:
    """Kill this process at the given call of a method of Chroma's, `"1"` being the first."""
    method, left = getattr(_CLASSES[kind], name), int(call)

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(_CLASSES[kind], name, counted)
