"""What a checkpoint folder holds, read without loading it.

Knows the files of a BGE-M3 or sentence-transformers checkpoint. Knows no hub, no torch and no
LangChain.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
SMALL_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TOKENIZERS,
    *HEADS,
)
POOLING_FILE = "1_Pooling/config.json"

_BLOCK = 1 << 16
_BLOCKS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and what its files say.

    Attributes:
        folder: Where the files are.
        name: The last part of the hub id or of the folder, for people to read.
        digest: Twelve hex digits over every file that changes the vectors.
        pooling: `"cls"` or `"mean"`.
        has_heads: Whether lexical weights and ColBERT vectors can be had.
        dimension: Width of a dense vector.
        positions: Longest input in tokens.
    """

    folder: Path
    name: str
    digest: str
    pooling: str
    has_heads: bool
    dimension: int
    positions: int


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read a checkpoint's facts and check that its files are whole.

    Args:
        folder: A local folder.
        name: How to call it in messages and in the fingerprint.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: A file that is needed is missing.
        ValueError: A file is damaged, or asks for a pooling that does not exist here.
        PermissionError: A file cannot be read.
    """
    config = _read_json(folder / "config.json")
    for file in (*weight_files(folder), *(folder / head for head in HEADS)):
        _check_whole(file)
    _require_tokenizer(folder)
    return Checkpoint(
        folder=folder,
        name=name,
        digest=_digest(folder),
        pooling=_pooling(folder / POOLING_FILE),
        has_heads=all((folder / head).exists() for head in HEADS),
        dimension=_config_number(config, "hidden_size", folder),
        positions=_positions(config, folder),
    )


def choose_weights(names: list[str]) -> list[str]:
    """The weight files to use out of those at the top of a checkpoint; safetensors before `.bin`.

    >>> choose_weights(["pytorch_model.bin", "model.safetensors", "onnx/model.onnx"])
    ['model.safetensors']
    """
    for single, shards in (
        ("model.safetensors", "model-"),
        ("pytorch_model.bin", "pytorch_model-"),
    ):
        if single in names:
            return [single]
        suffix = single.rsplit(".", 1)[1]
        sharded = sorted(n for n in names if n.startswith(shards) and n.endswith(suffix))
        if sharded:
            return [f"{single}.index.json", *sharded]
    return []


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local checkpoint.

    Raises:
        FileNotFoundError: There is none.
    """
    chosen = choose_weights([file.name for file in folder.iterdir()])
    if not chosen:
        msg = (
            f"The checkpoint folder {folder} holds neither model.safetensors nor "
            "pytorch_model.bin. Download it again, or pass the folder that holds the weights."
        )
        raise FileNotFoundError(msg)
    return [folder / name for name in chosen if not name.endswith(".json")]


def safetensors_keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone."""
    return [key for key in _safetensors_header(file)[0] if key != "__metadata__"]


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header and the size in bytes that the whole file should have."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        raw = stream.read(length) if 0 < length < 1 << 28 else b""
    try:
        header = json.loads(raw)
        end = max(tensor["data_offsets"][1] for key, tensor in header.items() if key[:2] != "__")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(_damaged(file, "it is not a safetensors file")) from error
    return header, 8 + length + int(end)


def _check_whole(file: Path) -> None:
    if not file.exists():
        return
    if file.suffix == ".safetensors":
        size, expected = file.stat().st_size, _safetensors_header(file)[1]
        if size != expected:
            raise ValueError(_damaged(file, f"it has {size:,} bytes instead of {expected:,}"))
        return
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    if not zipped or not zipfile.is_zipfile(file):
        raise ValueError(_damaged(file, "it is not a whole PyTorch file"))


def _damaged(file: Path, reason: str) -> str:
    return f"The checkpoint file {file} is damaged: {reason}. Delete it and download it again."


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        msg = (
            f"There is no {file.name} in the checkpoint folder {file.parent}. "
            "Pass the folder of a transformers checkpoint, or a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(file, f"it is not JSON ({error})")) from error
    if not isinstance(content, dict):
        raise ValueError(_damaged(file, "it is not a JSON object"))  # noqa: TRY004
    return content


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in TOKENIZERS):
        msg = (
            f"The checkpoint folder {folder} has no tokenizer (one of {', '.join(TOKENIZERS)}). "
            "Copy it there from where the weights came from."
        )
        raise FileNotFoundError(msg)


def _pooling(file: Path) -> str:
    if not file.exists():
        return "cls"
    config = _read_json(file)
    modes = {key[len("pooling_mode_") :]: on for key, on in config.items() if on is True}
    mode = config.get("pooling_mode") or next(iter(modes), "cls_token")
    pooling = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}.get(mode)
    if pooling is None:
        msg = (
            f"{file} asks for {mode!r} pooling, and only cls and mean exist here. "
            'Set pooling="cls" or pooling="mean" if that is what the model was trained for.'
        )
        raise ValueError(msg)
    return pooling


def _config_number(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(_damaged(folder / "config.json", f"its {key} is {value!r}"))
    return value


def _positions(config: dict[str, Any], folder: Path) -> int:
    positions = _config_number(config, "max_position_embeddings", folder)
    # The RoBERTa family counts positions from pad_token_id + 1.
    offset = config.get("pad_token_id", 1) + 1 if "roberta" in str(config.get("model_type")) else 0
    return int(positions - offset)


def _digest(folder: Path) -> str:
    """Hash small files whole and large ones in 64 evenly spread blocks.

    Training moves every layer, so 4 MiB out of 2.3 GB tell two models apart in milliseconds.
    """
    digest = hashlib.sha256()
    for file in sorted({*(folder / name for name in SMALL_FILES), *weight_files(folder)}):
        if file.exists():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size};".encode())
            _update(digest, file, size)
    return digest.hexdigest()[:12]


def _update(digest: Any, file: Path, size: int) -> None:
    with file.open("rb") as stream:
        if size <= 2 * _BLOCK * _BLOCKS:
            digest.update(stream.read())
            return
        for block in range(_BLOCKS):
            stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
