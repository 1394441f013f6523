"""One file of a checkpoint: what it holds, or that it is damaged, by its name."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_LFS_POINTER = b"version https://git-lfs"


class Parsing(AbstractContextManager[None]):
    """Turns whatever a parser raises at a broken file into a `ValueError` that names the file.

    Args:
        file: The file that is parsed.
        unrelated: Exceptions that pass as they are, beside `OSError` and `MemoryError`.
    """

    def __init__(self, file: Path, *unrelated: type[Exception]) -> None:
        self._file = file
        self._unrelated: tuple[type[Exception], ...] = (OSError, MemoryError, *unrelated)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raise the `ValueError`."""
        if isinstance(error, Exception) and not isinstance(error, self._unrelated):
            text = str(error).strip().partition("\n")[0].rstrip(" .")
            raise damaged(self._file, f"{type(error).__name__}: {text}") from error


def damaged(file: Path, reason: str) -> ValueError:
    """The error of a file that is not as it was written."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            reason = "it is a pointer of Git LFS in place of the file (`git lfs pull` fetches it)"
    return ValueError(
        f"The checkpoint file {file} is damaged: {reason}. Delete it and download it again."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    if not file.exists():
        msg = (
            f"There is no {file.name} in the checkpoint folder {file.parent}. "
            "Pass the folder of a transformers checkpoint, or a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    with Parsing(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise damaged(file, "it is not a JSON object")
    return content
