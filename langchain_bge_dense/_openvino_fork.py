"""OpenVINO in a forked process, where its threads are missing: what it holds must not run or end.

Knows no models.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

_running: weakref.WeakSet[Running] = weakref.WeakSet()
_used = False  # in this process or the one that it was forked from
_lost = False  # in the one that this process was forked from


class Running:
    """A compiled model ready to run.

    Args:
        compiled: OpenVINO's; None for one that cannot run.
    """

    def __init__(self, compiled: Any) -> None:
        global _used  # noqa: PLW0603 - a fact about the process
        _used = True
        self.request = None if compiled is None else compiled.create_infer_request()
        _running.add(self)

    def abandon(self) -> None:
        """Hold OpenVINO's objects for ever: to end, they would wait for threads."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.request))
        self.request = None


def threads_are_lost() -> bool:
    """Whether OpenVINO ran in the process that this one was forked from."""
    return _lost


def _after_fork_in_child() -> None:
    global _lost  # noqa: PLW0603 - a fact about the process
    if not _used:
        return
    _lost = True
    for running in list(_running):
        running.abandon()
    _exit_without_destructors()


def _exit_without_destructors() -> None:
    """Have the process end as soon as Python has: C++ would abort it for the missing threads."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc; the last one registered is called first
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
