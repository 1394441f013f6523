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
    encoder = _skeleton(checkpoint.folder)
    wanted = {
        name: tuple(weight.shape)
        for name, weight in encoder.named_parameters()
        if not name.startswith(_UNUSED)
    }
    files = weight_files(checkpoint.folder)
    missing = set(wanted)
    for file in files:
        for stored, shape in _shapes(file).items():
            name = _loaded_as(stored, encoder.base_model_prefix)
            _check_tensor(file, name, shape, wanted)
            missing.discard(name)
    if missing:
        reason = f"{len(missing)} tensors that config.json asks for are missing, {min(missing)} "
        raise ValueError(_foreign(files[0], f"{reason}among them"))
    if checkpoint.has_heads:
        _check_heads(checkpoint)


def _skeleton(folder: Path) -> Any:
    """The encoder that `config.json` describes, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    with Reading(folder / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        return AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )


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


def _loaded_as(stored: str, prefix: str) -> str:
    """The name under which transformers looks for a stored tensor in the model."""
    parts = stored.removeprefix(f"{prefix}.").split(".")
    return ".".join(_RENAMED.get(part, part) for part in parts)


def _check_tensor(file: Path, name: str, shape: tuple[int, ...], wanted: Shapes) -> None:
    layer = _LAYER.search(name)
    if name in wanted and shape != wanted[name]:
        reason = f"its tensor {name} is {shape}, and config.json makes it {wanted[name]}"
        raise ValueError(_foreign(file, reason))
    if name not in wanted and layer and not any(layer.group() in known for known in wanted):
        raise ValueError(_foreign(file, f"config.json has no layer for its tensor {name}"))


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
