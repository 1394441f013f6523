"""Whether weight files fit the model that `config.json` describes, before any weight is loaded.

transformers fills what is missing with random numbers and drops what is left over, with a remark.
Knows no hub and no devices.
"""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from langchain_bge_dense._checkpoint import HEADS, Reading, weight_files

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_bge_dense._checkpoint import Checkpoint

    Shapes = dict[str, tuple[int, ...]]

_LAYER = re.compile(r"\blayers?\.\d+\.")
_UNUSED = "pooler."  # BGE-M3 pools by itself
_RENAMED = {"gamma": "weight", "beta": "bias"}  # by TensorFlow, where BERT comes from


def check_weights(checkpoint: Checkpoint) -> None:
    """Check names and shapes of all tensors; reads headers only, and runs no code of the files.

    Raises:
        ValueError: A file is damaged or hostile, or belongs to another model.
    """
    wanted = _wanted(checkpoint.folder)
    files = weight_files(checkpoint.folder)
    missing = set(wanted)
    for file in files:
        for name, shape in _shapes(file).items():
            missing.discard(_match(name, shape, wanted, file))
    if missing:
        reason = f"{len(missing)} tensors that config.json asks for are missing, {min(missing)} "
        raise ValueError(_foreign(files[0], f"{reason}among them"))
    if checkpoint.has_heads:
        _check_heads(checkpoint)


def _wanted(folder: Path) -> Shapes:
    """Names and shapes of the encoder's weights, from `config.json` alone."""
    import torch
    from transformers import AutoConfig, AutoModel

    with Reading(folder / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        encoder = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return {
        name: tuple(parameter.shape)
        for name, parameter in encoder.named_parameters()
        if not name.startswith(_UNUSED)
    }


def _shapes(file: Path) -> Shapes:
    if file.suffix == ".safetensors":
        with Reading(file), safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return _pickled_shapes(file)


def _pickled_shapes(file: Path) -> Shapes:
    import torch

    with Reading(file):
        try:
            tensors: Any = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            # torch's own text goes on to say how to run the code.
            msg = "it holds other things than tensors, which could be code"
            raise pickle.UnpicklingError(msg) from error
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _match(name: str, shape: tuple[int, ...], wanted: Shapes, file: Path) -> str:
    """The weight that a stored tensor is, or an empty string for none."""
    parts = [_RENAMED.get(part, part) for part in name.split(".")]
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    found = next((suffix for suffix in suffixes if suffix in wanted), "")
    layer = _LAYER.search(name)
    if not found and layer and not any(layer.group() in known for known in wanted):
        raise ValueError(_foreign(file, f"config.json has no layer for its tensor {name}"))
    if found and shape != wanted[found]:
        reason = f"its tensor {name} is {shape}, and config.json makes it {wanted[found]}"
        raise ValueError(_foreign(file, reason))
    return found


def _check_heads(checkpoint: Checkpoint) -> None:
    for name, width in zip(HEADS, (checkpoint.dimension, 1), strict=True):
        file = checkpoint.folder / name
        wanted = {"weight": (width, checkpoint.dimension), "bias": (width,)}
        shapes = _shapes(file)
        if shapes != wanted:
            raise ValueError(_foreign(file, f"its tensors are {shapes} instead of {wanted}"))


def _foreign(file: Path, reason: str) -> str:
    return (
        f"The weights in {file} belong to another model than config.json: {reason}. "
        "Download the whole checkpoint again."
    )


def check_vocabulary(tokenizer: Any, rows: int, folder: Path) -> None:
    """Check that every token has a row in the embedding matrix.

    Args:
        tokenizer: The loaded tokenizer.
        rows: Rows of the matrix.
        folder: The checkpoint folder.

    Raises:
        ValueError: A token has none, or the tokenizer knows special tokens only.
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
