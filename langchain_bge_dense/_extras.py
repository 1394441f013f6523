"""The message of an extra that is not installed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def needs(extra: str, part: str) -> Iterator[None]:
    """Name the extra of `pyproject.toml` that an import lacks, and the part that needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("langchain_bge_dense"):
            raise
        msg = (
            f"{part} needs {error.name}, which is not installed. "
            f'In a clone of langchain-bge-dense run: pip install ".[{extra}]"'
        )
        raise ModuleNotFoundError(msg, name=error.name) from error
