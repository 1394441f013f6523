"""One file of a checkpoint: what it holds, or that it is damaged, by its name."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from langchain_bge_dense.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    Shapes = dict[str, tuple[int, ...]]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order that transformers prefers

_LFS_POINTER = b"version https://git-lfs"
_BEFORE_PYTORCH_1_6 = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

# So many that one falls into each matrix of BGE-M3, 4 MiB of 2.3 GB.
_DIGEST_BLOCKS = 1 << 10
_BLOCK_BYTES = 1 << 12


class Parsing(AbstractContextManager[None]):
    """Turn any error of a parser at a damaged file into a `ValueError` that names the file.

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
            raise damaged(self._file, f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Extract the first line of an error's text, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(" .")


def damaged(file: Path, reason: str) -> BrokenCheckpointError:
    """Make the error for a damaged file."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            reason = "it is a pointer of Git LFS in place of the file (`git lfs pull` fetches it)"
    return BrokenCheckpointError(
        f"The checkpoint file {file} is damaged: {reason}. Delete it and download it again."
    )


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON object, or a list."""
    if not file.exists():
        msg = (
            f"There is no {file.name} in the checkpoint folder {file.parent}. "
            "Pass the folder of a transformers checkpoint, or a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    with Parsing(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, kind):
        raise damaged(file, f"it is not a JSON {'object' if kind is dict else 'list'}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Find the weight files in a folder, safetensors before `.bin`. At least one is required."""
    for single in WEIGHTS:
        if (folder / single).exists():
            return [folder / single]
        if (index := folder / f"{single}.index.json").exists():
            return _shards(index)
    msg = (
        f"The checkpoint folder {folder} holds neither {' nor '.join(WEIGHTS)}. "
        "Copy the weights there, or pass the folder that holds them."
    )
    raise FileNotFoundError(msg)


def _shards(index: Path) -> list[Path]:
    files = read_json(index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not names or any("/" in name or "\\" in name for name in names):
        raise damaged(index, "its weight_map is not a list of files beside it")
    missing = [name for name in names if not index.with_name(name).exists()]
    if missing:
        msg = (
            f"The checkpoint folder {index.parent} lacks {', '.join(missing)}, which {index.name} "
            "lists. Copy them there from where the others came from."
        )
        raise FileNotFoundError(msg)
    return [index.with_name(name) for name in names]


def check_container(file: Path) -> None:
    """Check that a file of tensors is not cut short, without reading them."""
    with file.open("rb") as stream, Parsing(file):  # safetensors would not name an unreadable file
        if file.suffix == ".safetensors":
            safe_open(file, framework="np")
        elif is_mappable(file):
            zipfile.ZipFile(stream)


def is_mappable(file: Path) -> bool:
    """Tell whether a file of tensors can be mapped, as all since PyTorch 1.6."""
    with file.open("rb") as stream:
        return stream.read(len(_BEFORE_PYTORCH_1_6)) != _BEFORE_PYTORCH_1_6


def shapes(file: Path) -> Shapes:
    """Read names and shapes of the tensors in a file, without running code of it."""
    if file.suffix == ".safetensors":
        with Parsing(file), safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(file, "meta").items()}


def tensors_of(file: Path, device: str = "cpu") -> dict[str, Any]:
    """Read the tensors in a file, mapped if possible, without running code of it."""
    import torch
    from safetensors.torch import load_file

    with Parsing(file):
        if file.suffix == ".safetensors":
            return load_file(file, device)
        mapped = is_mappable(file)
        try:
            tensors: Any = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            # torch's own text goes on to say how to run the code.
            msg = "it holds other things than tensors, which could be code"
            raise pickle.UnpicklingError(msg) from error
        for tensor in tensors.values():
            tensor.shape  # noqa: B018 - raises where it is something else
        return dict(tensors)


def digest_of(folder: Path, files: Iterable[Path], settings: str) -> str:
    """Digest settings and files of a folder in milliseconds, to twelve hex digits.

    Small files are hashed whole, large ones in evenly spread blocks.
    """
    digest = hashlib.sha256(settings.encode())
    for file in sorted(set(files)):
        if file.exists():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
            update_digest(digest, file, size)
    return digest.hexdigest()[:12]


def update_digest(digest: Any, file: Path, size: int) -> None:
    """Hash a small file whole, and a large one in blocks."""
    with file.open("rb") as stream:
        if size <= 2 * _BLOCK_BYTES * _DIGEST_BLOCKS:
            digest.update(stream.read())
            return
        for block in range(_DIGEST_BLOCKS):
            stream.seek((size - _BLOCK_BYTES) * block // (_DIGEST_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
