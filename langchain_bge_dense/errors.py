"""Errors that callers handle by their class, beside the builtin exceptions that they are."""

from __future__ import annotations

__all__ = ["AnotherModelError", "BrokenCheckpointError", "FolderBusyError"]


class AnotherModelError(ValueError):
    """The collection holds vectors of another model."""


class BrokenCheckpointError(ValueError):
    """A file of the checkpoint is missing a part, or was changed."""


class FolderBusyError(RuntimeError):
    """Another process writes to the folder of the collection."""
