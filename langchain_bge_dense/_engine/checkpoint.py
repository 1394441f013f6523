"""What the files of a BGE-M3 or sentence-transformers checkpoint say, and whether they are whole.

transformers fills missing tensors with random numbers and drops surplus ones, with a remark in a
log; of a damaged file, neither it nor torch gives the name. So names, shapes and vocabulary are
compared here before any weight is loaded.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from langchain_bge_dense._engine.files import Parsing, damaged, read_json
from langchain_bge_dense._engine.modules import Prompts, read_prompts

if TYPE_CHECKING:
    from pathlib import Path

    Shapes = dict[str, tuple[int, ...]]

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SMALL_FILES = ("config.json", *TOKENIZER_SETTINGS, *TOKENIZERS, *HEADS)
POOLING_FILE = "1_Pooling/config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order that transformers prefers

# Settings that make transformers load, even download, other files than those verified here.
_REDIRECTING_SETTINGS = (
    "transformers_weights",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
)
_POOLING_MODES = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
# Families that count positions from pad_token_id + 1.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text")
_LAYER = re.compile(r"\blayers?\.\d+\.")
_UNUSED = "pooler."  # BGE-M3 pools by itself
_TENSORFLOW_NAMES = {"gamma": "weight", "beta": "bias"}

# So many that one falls into each matrix of BGE-M3, 4 MiB of 2.3 GB.
_DIGEST_BLOCKS = 1 << 10
_BLOCK_BYTES = 1 << 12


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and what its files say.

    Attributes:
        folder: Where the files are.
        name: The last part of the hub id or of the folder, for people to read.
        digest: Twelve hex digits over every file that changes the vectors.
        has_heads: Whether it has lexical weights and ColBERT vectors.
        dimension: Width of a dense vector.
        positions: Longest input in tokens.
        prompts: What its authors put in front of queries and documents.
    """

    folder: Path
    name: str
    digest: str
    has_heads: bool
    dimension: int
    positions: int
    prompts: Prompts

    @property
    def pooling(self) -> str:
        """`"cls"` or `"mean"`, as the checkpoint's pooling file says.

        Raises:
            ValueError: The file names another pooling.
        """
        return _pooling(self.folder / POOLING_FILE)

    def longest(self, max_length: int | None) -> int:
        """Tokens that texts are cut to; with None, as many as there are positions.

        Raises:
            ValueError: `max_length` is more than that.
        """
        if max_length is not None and max_length > self.positions:
            msg = (
                f"max_length={max_length:,} is more than the {self.positions:,} positions of "
                f"{self.name!r}. Use {self.positions:,} or less."
            )
            raise ValueError(msg)
        return max_length or self.positions


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read a checkpoint's facts and check that no file is missing or cut short.

    Args:
        folder: A local folder. Links in it are followed wherever they lead.
        name: What to call it in messages and in the fingerprint.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: A required file is missing.
        ValueError: A file is damaged, or redirects transformers to files that are not verified.
        OSError: A file cannot be read.
    """
    config = read_json(folder / "config.json")
    _refuse_redirects(config, folder)
    _require_tokenizer(folder)
    heads = [folder / head for head in HEADS if (folder / head).exists()]
    for file in (*weight_files(folder), *heads):
        _check_container(file)
    return Checkpoint(
        folder=folder,
        name=name,
        digest=_digest(folder),
        has_heads=len(heads) == len(HEADS),
        dimension=_config_number(config, "hidden_size", folder),
        positions=_positions(config, folder),
        prompts=read_prompts(folder),
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a local checkpoint; safetensors before `.bin`.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
        ValueError: The list of shards is damaged.
    """
    for single in WEIGHTS:
        if (folder / single).exists():
            return [folder / single]
        if (index := folder / f"{single}.index.json").exists():
            return _shards(index)
    msg = (
        f"The checkpoint folder {folder} holds neither {' nor '.join(WEIGHTS)}. "
        "Download it again, or pass the folder that holds the weights."
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
            "lists. Download it again."
        )
        raise FileNotFoundError(msg)
    return [index.with_name(name) for name in names]


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare names and shapes of all tensors with `config.json`; runs no code of the files.

    Raises:
        ValueError: A file is damaged or hostile, or belongs to another model.
    """
    expected, prefix = _expected_shapes(checkpoint.folder)
    files = weight_files(checkpoint.folder)
    missing = set(expected)
    for file in files:
        for stored, shape in _shapes(file).items():
            name = _model_name(stored, prefix)
            _check_tensor(file, name, shape, expected)
            missing.discard(name)
    if missing:
        reason = f"{len(missing)} tensors that config.json asks for are missing, {min(missing)} "
        raise _mismatched(files[0], f"{reason}among them")
    if checkpoint.has_heads:
        _check_heads(checkpoint)


def _expected_shapes(folder: Path) -> tuple[Shapes, str]:
    """Shapes of the encoder that `config.json` describes, and the prefix that names it."""
    import torch
    from transformers import AutoConfig, AutoModel

    with Parsing(folder / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        encoder: Any = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    used = {name: shape for name, shape in shapes.items() if not name.startswith(_UNUSED)}
    return used, encoder.base_model_prefix


def _shapes(file: Path) -> Shapes:
    if file.suffix == ".safetensors":
        with Parsing(file), safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return _pickled_shapes(file)


def _pickled_shapes(file: Path) -> Shapes:
    import torch

    with Parsing(file):
        try:
            tensors: Any = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            # torch's own text goes on to say how to run the code.
            msg = "it holds other things than tensors, which could be code"
            raise pickle.UnpicklingError(msg) from error
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _model_name(stored: str, prefix: str) -> str:
    """The name under which transformers looks for a stored tensor in the model."""
    parts = stored.removeprefix(f"{prefix}.").split(".")
    return ".".join(_TENSORFLOW_NAMES.get(part, part) for part in parts)


def _check_tensor(file: Path, name: str, shape: tuple[int, ...], expected: Shapes) -> None:
    layer = _LAYER.search(name)
    if name in expected and shape != expected[name]:
        reason = f"its tensor {name} is {shape}, and config.json makes it {expected[name]}"
        raise _mismatched(file, reason)
    if name not in expected and layer and not any(layer.group() in known for known in expected):
        raise _mismatched(file, f"config.json has no layer for its tensor {name}")


def _check_heads(checkpoint: Checkpoint) -> None:
    for name, width in zip(HEADS, (checkpoint.dimension, 1), strict=True):
        file = checkpoint.folder / name
        expected = {"weight": (width, checkpoint.dimension), "bias": (width,)}
        shapes = _shapes(file)
        if shapes != expected:
            raise _mismatched(file, f"its tensors are {shapes} instead of {expected}")


def check_vocabulary(tokenizer: Any, rows: int, folder: Path) -> None:
    """Check that every token has a row in the embedding matrix.

    Args:
        tokenizer: The loaded tokenizer.
        rows: Rows of the matrix.
        folder: The checkpoint folder.

    Raises:
        ValueError: A token has no row, or the tokenizer knows special tokens only.
    """
    ids = set(tokenizer.get_vocab().values())
    if max(ids, default=0) >= rows:
        msg = (
            f"The tokenizer in {folder} has token ids up to {max(ids):,}, and the model has "
            f"embeddings for {rows:,}. They belong to different models: download both again."
        )
        raise ValueError(msg)
    if ids <= set(tokenizer.all_special_ids):
        msg = (
            f"The tokenizer in {folder} knows no tokens but the special ones: its vocabulary file "
            "is missing or of another kind of model. Download the checkpoint again."
        )
        raise ValueError(msg)


def _mismatched(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"The weights in {file} belong to another model than config.json: {reason}. "
        "Download the whole checkpoint again."
    )


def _check_container(file: Path) -> None:
    with file.open("rb") as stream, Parsing(file):  # safetensors would not name an unreadable file
        if file.suffix == ".safetensors":
            safe_open(file, framework="np")
        else:
            zipfile.ZipFile(stream)


def _refuse_redirects(config: dict[str, Any], folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        msg = (
            f"The checkpoint folder {folder} holds an adapter (adapter_config.json). Merge it into "
            "the weights, and remove its files."
        )
        raise ValueError(msg)
    for key in _REDIRECTING_SETTINGS:
        if config.get(key):
            msg = (
                f"{folder / 'config.json'} sets {key}={config[key]!r}, which would load "
                "something else than the checkpoint's own weights and code. "
                "Remove it from the file."
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
            read_json(folder / name)


def _pooling(file: Path) -> str:
    if not file.exists():
        return "cls"
    config = read_json(file)
    prefix = "pooling_mode_"
    modes = [key[len(prefix) :] for key, on in config.items() if on is True and prefix in key]
    mode = str(config.get("pooling_mode") or "+".join(modes) or "cls")
    if mode not in _POOLING_MODES:
        msg = (
            f"{file} asks for {mode} pooling, and only cls and mean are supported. "
            'Set pooling="cls" or pooling="mean" if that is what the model was trained for.'
        )
        raise ValueError(msg)
    return _POOLING_MODES[mode]


def _config_number(config: dict[str, Any], key: str, folder: Path, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < least:
        raise damaged(folder / "config.json", f"its {key} is {value!r}")
    return value


def _positions(config: dict[str, Any], folder: Path) -> int:
    positions = _config_number(config, "max_position_embeddings", folder)
    family = str(config.get("model_type"))
    if not any(name in family for name in _OFFSET_POSITIONS):
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
            _update_digest(digest, file, size)
    return digest.hexdigest()[:12]


def _update_digest(digest: Any, file: Path, size: int) -> None:
    with file.open("rb") as stream:
        if size <= 2 * _BLOCK_BYTES * _DIGEST_BLOCKS:
            digest.update(stream.read())
            return
        for block in range(_DIGEST_BLOCKS):
            stream.seek((size - _BLOCK_BYTES) * block // (_DIGEST_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
