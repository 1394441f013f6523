"""What a checkpoint folder holds, read without loading it.

Knows the files of a BGE-M3 or sentence-transformers checkpoint. Knows no hub, no torch and no
LangChain.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SMALL_FILES = ("config.json", *TOKENIZER_SETTINGS, *TOKENIZERS, *HEADS)
POOLING_FILE = "1_Pooling/config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers prefers them in this order

# What makes transformers load, even download, other things than those that are checked here.
_DETOURS = (
    "transformers_weights",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
)
_POOLING_MODES = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
# Families that count positions from pad_token_id + 1.
_PADDED_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text")
_LFS_POINTER = b"version https://git-lfs"

# So many that one falls into each matrix of BGE-M3, 4 MiB of 2.3 GB.
_BLOCKS = 1 << 10
_BLOCK = 1 << 12


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and what its files say.

    Attributes:
        folder: Where the files are.
        name: The last part of the hub id or of the folder, for people to read.
        digest: Twelve hex digits over every file that changes the vectors.
        has_heads: Whether lexical weights and ColBERT vectors can be had.
        dimension: Width of a dense vector.
        positions: Longest input in tokens.
    """

    folder: Path
    name: str
    digest: str
    has_heads: bool
    dimension: int
    positions: int

    @property
    def pooling(self) -> str:
        """`"cls"` or `"mean"`, as the checkpoint's pooling file says.

        Raises:
            ValueError: It asks for a pooling that does not exist here.
        """
        return _pooling(self.folder / POOLING_FILE)


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read a checkpoint's facts and check that its files are whole.

    Args:
        folder: A local folder. Links in it are followed wherever they lead.
        name: How to call it in messages and in the fingerprint.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: A file that is needed is missing.
        ValueError: A file is damaged, or would have something else loaded than is checked here.
        OSError: A file cannot be read.
    """
    config = _read_json(folder / "config.json")
    _refuse_detours(config, folder)
    _require_tokenizer(folder)
    heads = [folder / head for head in HEADS if (folder / head).exists()]
    for file in (*weight_files(folder), *heads):
        _check_whole(file)
    return Checkpoint(
        folder=folder,
        name=name,
        digest=_digest(folder),
        has_heads=len(heads) == len(HEADS),
        dimension=_config_number(config, "hidden_size", folder),
        positions=_positions(config, folder),
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local checkpoint; safetensors before `.bin`.

    Raises:
        FileNotFoundError: There is none, or one of several is missing.
        ValueError: The list of several files is damaged.
    """
    present = {file.name for file in folder.iterdir()}
    for single in WEIGHTS:
        if single in present:
            return [folder / single]
        if f"{single}.index.json" in present:
            return _shards(folder / f"{single}.index.json")
    msg = (
        f"The checkpoint folder {folder} holds neither {' nor '.join(WEIGHTS)}. "
        "Download it again, or pass the folder that holds the weights."
    )
    raise FileNotFoundError(msg)


def _shards(index: Path) -> list[Path]:
    files = _read_json(index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not names or any("/" in name or "\\" in name for name in names):
        raise ValueError(damaged(index, "its weight_map is not a list of files beside it"))
    shards = [index.with_name(name) for name in names]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        msg = (
            f"The checkpoint folder {index.parent} lacks {', '.join(missing)}, which {index.name} "
            "lists. Download it again."
        )
        raise FileNotFoundError(msg)
    return shards


class Reading(AbstractContextManager[None]):
    """Turns whatever a parser throws at a broken file into a `ValueError` that names the file.

    Args:
        file: The file that is read.
        spared: Exceptions that say nothing about the file, beside `OSError` and `MemoryError`.
    """

    def __init__(self, file: Path, *spared: type[Exception]) -> None:
        self._file = file
        self._spared: tuple[type[Exception], ...] = (OSError, MemoryError, *spared)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raise the `ValueError`."""
        if not isinstance(error, Exception) or isinstance(error, self._spared):
            return
        text = str(error).strip().partition("\n")[0].rstrip(" .")
        raise ValueError(damaged(self._file, f"{type(error).__name__}: {text}")) from error


def damaged(file: Path, reason: str) -> str:
    """What to say of a file that cannot be used."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            reason = "it is a pointer of Git LFS in place of the file (`git lfs pull` fetches it)"
    return f"The checkpoint file {file} is damaged: {reason}. Delete it and download it again."


def _check_whole(file: Path) -> None:
    with file.open("rb") as stream:  # safetensors' own errors would not name the file
        zipped = stream.read(2) == b"PK"
    if file.suffix == ".safetensors":
        with Reading(file), safe_open(file, framework="np"):
            return
    if not zipped or not zipfile.is_zipfile(file):
        raise ValueError(damaged(file, "it is not a whole PyTorch file"))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        msg = (
            f"There is no {file.name} in the checkpoint folder {file.parent}. "
            "Pass the folder of a transformers checkpoint, or a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    with Reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(damaged(file, "it is not a JSON object"))  # noqa: TRY004
    return content


def _refuse_detours(config: dict[str, Any], folder: Path) -> None:
    asked = [key for key in _DETOURS if config.get(key)]
    if (folder / "adapter_config.json").exists():
        msg = (
            f"The checkpoint folder {folder} holds an adapter (adapter_config.json). Merge it into "
            "the weights, and remove its files."
        )
        raise ValueError(msg)
    if asked:
        msg = (
            f"{folder / 'config.json'} sets {asked[0]}={config[asked[0]]!r}, which would load "
            "something else than the checkpoint's own weights and code. Remove it from the file."
        )
        raise ValueError(msg)


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in TOKENIZERS):
        msg = (
            f"The checkpoint folder {folder} has no tokenizer (one of {', '.join(TOKENIZERS)}). "
            "Copy it there from where the weights came from."
        )
        raise FileNotFoundError(msg)
    for name in TOKENIZER_SETTINGS:
        if (folder / name).exists():
            _read_json(folder / name)


def _pooling(file: Path) -> str:
    if not file.exists():
        return "cls"
    config = _read_json(file)
    prefix = "pooling_mode_"
    modes = [key[len(prefix) :] for key, on in config.items() if on is True and prefix in key]
    mode = str(config.get("pooling_mode") or "+".join(modes) or "cls")
    if mode not in _POOLING_MODES:
        msg = (
            f"{file} asks for {mode} pooling, and only cls and mean exist here. "
            'Set pooling="cls" or pooling="mean" if that is what the model was trained for.'
        )
        raise ValueError(msg)
    return _POOLING_MODES[mode]


def _config_number(config: dict[str, Any], key: str, folder: Path, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < least:
        raise ValueError(damaged(folder / "config.json", f"its {key} is {value!r}"))
    return value


def _positions(config: dict[str, Any], folder: Path) -> int:
    positions = _config_number(config, "max_position_embeddings", folder)
    family = str(config.get("model_type"))
    if not any(name in family for name in _PADDED_POSITIONS):
        return positions
    padding = _config_number({"pad_token_id": 1, **config}, "pad_token_id", folder, least=0)
    return positions - padding - 1


def _digest(folder: Path) -> str:
    """Hash small files whole and large ones in evenly spread blocks, in milliseconds."""
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
