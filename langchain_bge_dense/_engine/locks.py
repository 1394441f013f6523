"""Locks of a module that are free in a forked child."""

from __future__ import annotations

import os
import threading


def forkable_lock() -> threading.Lock:
    """Make a lock that a forked child can use, for as long as the process lives.

    Another thread of a parent may hold it at a fork, and would never let it go in the child.
    """
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001
    return lock
