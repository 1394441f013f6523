"""Weights of an encoder in files, part by part: in a checkpoint's own, and in one written here.

A file is mapped anew for each part, so that few of its pages are resident at a time.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from langchain_bge_dense._engine.files import is_mappable, tensors_of, weight_files
from langchain_bge_dense._engine.linear import Quantized

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

    from torch import Tensor

    from langchain_bge_dense._engine.layers import Parts

_HEADER_BYTES = 1 << 18  # a table of tensors, filled up with blanks
_ALIGNMENT = 64
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_PARTS = ("embeddings.", "encoder.")
_SAMPLE = 1_024  # numbers of a tensor that are compared


class CheckpointWeights:
    """Weights of an encoder in a checkpoint's own files, by transformers' names.

    Args:
        folder: The checkpoint's folder.
        places: The file of each weight, and its name there.
    """

    def __init__(self, folder: Path, places: dict[str, tuple[str, str]]) -> None:
        self._folder = folder
        self.places = places

    def __call__(self, part: str) -> dict[str, Tensor]:
        """Read the weights of a part, by their names in it."""
        wanted = {name: at for name, at in self.places.items() if name.startswith(f"{part}.")}
        files = {file: tensors_of(self._folder / file) for file in {f for f, _ in wanted.values()}}
        return {name[len(part) + 1 :]: files[file][key] for name, (file, key) in wanted.items()}

    @classmethod
    def find(cls, folder: Path, encoder: Any) -> CheckpointWeights | None:
        """Find the weights that an encoder was loaded from, or None if the files differ."""
        files = weight_files(folder)
        if not all(map(is_mappable, files)):
            return None
        found = {key: (file, t) for file in files for key, t in tensors_of(file).items()}
        places = {}
        for name, weight in encoder.named_parameters():
            if not name.startswith(_PARTS):  # a pooler
                continue
            keys = (name, f"{encoder.base_model_prefix}.{name}")
            key = next((key for key in keys if key in found), None)
            if key is None or not _is_alike(found[key][1], weight):
                return None
            places[name] = (found[key][0].name, key)
        return cls(folder, places)


def _is_alike(stored: Tensor, loaded: Tensor) -> bool:
    samples = [weight.flatten()[:_SAMPLE] for weight in (stored, loaded)]
    same_kind = (stored.shape, stored.dtype) == (loaded.shape, loaded.dtype)
    return same_kind and torch.equal(*samples)


class FileParts:
    """Parts of an encoder in a file, which is mapped anew for each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, name: str) -> dict[str, Any]:
        with safe_open(self._path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
            found = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}
        for weight in [key[: -len(".codes")] for key in found if key.endswith(".codes")]:
            fields = (found.pop(f"{weight}.{field}") for field in Quantized._fields)
            found[weight] = Quantized(*fields)
        return found


def _flat(part: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for name, weight in part.items():
        if isinstance(weight, Quantized):
            for field, tensor in zip(Quantized._fields, weight, strict=True):
                yield f"{name}.{field}", tensor
        else:
            yield name, weight


def write_parts(
    stream: BinaryIO, facts: str, tokenizer: str, names: Iterable[str], parts: Parts
) -> None:
    """Write parts of an encoder as safetensors.

    One after the other, where safetensors' own writer wants all of them in memory.

    Args:
        stream: A new file.
        facts: Metadata of the file.
        tokenizer: Stored as a tensor, as it is large.
        names: Of parts.
        parts: Gives them.
    """
    table: dict[str, Any] = {"__metadata__": {"facts": facts}}
    end = 0

    def add(name: str, tensor: Tensor) -> None:
        nonlocal end
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        table[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        stream.write(data.data)
        end += len(data)

    stream.seek(_HEADER_BYTES)
    for name, tensor in ((f"{n}/{key}", t) for n in names for key, t in _flat(parts(n))):
        add(name, tensor)
        if rest := -end % _ALIGNMENT:  # holes are not allowed
            add(f"padding/{end}", torch.zeros(rest, dtype=torch.uint8))
    add("tokenizer", torch.frombuffer(bytearray(tokenizer.encode()), dtype=torch.uint8))
    header = json.dumps(table).encode().ljust(_HEADER_BYTES - 8)
    if len(header) > _HEADER_BYTES - 8:
        msg = f"its table of {len(table)} tensors takes more than {_HEADER_BYTES:,} bytes"
        raise ValueError(msg)
    stream.seek(0)
    stream.write(len(header).to_bytes(8, "little") + header)
    stream.flush()
    os.fsync(stream.fileno())  # else a power cut may leave the name without the content
