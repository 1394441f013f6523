"""The fork and the end of a process: locks and tokenizers that both leave usable."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOKENIZER_THREADS = 64  # at a time
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def at_fork(**hooks: Callable[[], object]) -> None:
    """Register hooks of `os.register_at_fork`, where the system forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


def forkable_lock() -> threading.Lock:
    """Make a lock that a forked child can use, for as long as the process lives.

    Another thread of a parent may hold it at a fork, and would never let it go in the child.
    """
    lock = threading.Lock()
    at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001
    return lock


class _Tokenizers:
    """The tokenizers of this process, whose own threads survive neither a fork nor an exit."""

    def __init__(self) -> None:
        self._used = self._set_for_fork = False
        self._exiting = threading.Event()
        self._permits = threading.Semaphore(_TOKENIZER_THREADS)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Tokenise in this thread."""
        self._used = True
        if threading.current_thread() is threading.main_thread():
            yield
            return
        with self._permits:
            yield
        if self._exiting.is_set():
            threading.Event().wait()  # until Python ends this thread

    def at_exit(self) -> None:
        """Let threads leave, and none enter.

        Python ends daemon threads where they are: in older tokenizers this aborts the process.
        """
        self._exiting.set()
        for _ in range(_TOKENIZER_THREADS):
            self._permits.acquire()

    def before_fork(self) -> None:
        """Set the variable that older tokenizers warn of at a fork, where it is not set."""
        self._set_for_fork = self._used and _PARALLELISM not in os.environ
        if self._set_for_fork:
            os.environ[_PARALLELISM] = "false"

    def after_fork_in_parent(self) -> None:
        """Restore the variable."""
        if self._set_for_fork:
            os.environ.pop(_PARALLELISM, None)

    def after_fork_in_child(self) -> None:
        """Forget the threads of the parent, which are not here and would never come back."""
        self._permits = threading.Semaphore(_TOKENIZER_THREADS)
        if self._used:
            os.environ[_PARALLELISM] = "false"


tokenizers = _Tokenizers()
atexit.register(tokenizers.at_exit)
at_fork(
    before=tokenizers.before_fork,
    after_in_parent=tokenizers.after_fork_in_parent,
    after_in_child=tokenizers.after_fork_in_child,
)
