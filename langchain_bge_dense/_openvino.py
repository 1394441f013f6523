"""A transformers encoder run by OpenVINO on a CPU, under the same call.

Knows no hub, no tokenizer, no heads and no threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from langchain_bge_dense import _openvino_fork
from langchain_bge_dense._checkpoint import Reading
from langchain_bge_dense._loading import quiet_transformers
from langchain_bge_dense._openvino_graph import (
    FORMAT,
    MASKED,
    MODEL_TYPES,
    build_graph,
    compile_graph,
    fits,
    import_openvino,
    is_installed,
)

if TYPE_CHECKING:
    from pathlib import Path

    from FlagEmbedding import BGEM3FlagModel
    from torch import Tensor

logger = logging.getLogger(__name__)

__all__ = ["OpenVinoEncoder", "is_installed", "replace_encoder", "supports"]

_FILES = ("model.xml", "model.bin")


def supports(folder: Path) -> bool:
    """Whether the encoder of a checkpoint can be run."""
    from transformers import AutoConfig

    with Reading(folder / "config.json"):
        return fits(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))


def replace_encoder(flag: BGEM3FlagModel, digest: str, dtype: str, cache_folder: Path) -> None:
    """Replace the encoder in a `BGEM3FlagModel` by the same encoder compiled by OpenVINO.

    Args:
        flag: A model in float32 on the CPU. Its layers' weights, mapped from the file, are not
            read, and are let go of.
        digest: Names the checkpoint's contents in the cache.
        dtype: What the linear layers multiply in: `"float32"`, `"bfloat16"` or `"int8"`.
        cache_folder: Where converted layers are kept; float32 needs no conversion.

    Raises:
        ImportError: OpenVINO is not installed, or broken.
        ValueError: The encoder is of another kind than OpenVINO gets a graph for here.
    """
    encoder: Any = flag.model.model
    if not fits(encoder.config):
        msg = (
            f"The OpenVINO backend cannot run an encoder of type {encoder.config.model_type!r} "
            f'(only {", ".join(MODEL_TYPES)}, with GELU). Use backend="torch".'
        )
        raise ValueError(msg)
    ov = import_openvino()
    if _openvino_fork.threads_are_lost():
        compiled = None
    elif dtype == "float32":
        compiled = compile_graph(build_graph(encoder, dtype), dtype)
    else:
        entry = cache_folder / f"{digest}-{dtype}-{FORMAT}-{version('openvino')}"
        compiled = compile_graph(_from_cache(ov, entry, encoder.name_or_path, dtype), dtype)
    flag.model.model = OpenVinoEncoder(encoder, compiled)


class OpenVinoEncoder(nn.Module):
    """Stands in for a transformers encoder: the same call gives the same `last_hidden_state`.

    Args:
        encoder: The transformers encoder; its embeddings are kept, its layers are not.
        compiled: Its layers; None where they cannot run, after a fork.
    """

    def __init__(self, encoder: Any, compiled: Any) -> None:
        super().__init__()
        self.config = encoder.config
        self.name_or_path = encoder.name_or_path
        self.embeddings = encoder.embeddings
        self._running = _openvino_fork.Running(compiled)
        self._in_torch: list[Any] = []

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Run a batch.

        Args:
            input_ids: Token ids, `(B, T)`.
            attention_mask: 1 for tokens, 0 for padding, `(B, T)`.

        Returns:
            An output whose `last_hidden_state` is `(B, T, D)`, float32, zero at padding.
        """
        request = self._running.request
        if request is None:
            return self._torch_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        states = self.embeddings(input_ids=input_ids)  # (B, T, D)
        width = states.shape[-1]
        mask = attention_mask.bool()  # (B, T)
        tokens = mask.flatten().nonzero().squeeze(1)  # (S,): where the tokens are in (B * T)
        slots = (mask.flatten().cumsum(0) - 1).clamp_(min=0)  # (B * T,): any token for padding
        inputs = {
            "states": states.reshape(-1, width)[tokens],  # (S, D)
            "tokens": tokens,
            "slots": slots.reshape(mask.shape),
            "bias": (~mask).float().mul_(MASKED)[:, None, None],  # (B, 1, 1, T)
        }
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        packed = request.infer(arrays, share_inputs=True, share_outputs=True)[0]  # (S, D)
        hidden = states.new_zeros(mask.numel(), width)  # (B * T, D)
        hidden[tokens] = torch.from_numpy(packed)
        return BaseModelOutput(last_hidden_state=hidden.view(*mask.shape, width))

    def _torch_encoder(self) -> Any:
        if not self._in_torch:
            logger.warning(
                "This process was forked from one that had loaded the model, and OpenVINO's "
                "threads are not in it: PyTorch runs it here, slower. Load it after the fork."
            )
            self._in_torch.append(self.exact())  # in a list, as it is no part of this module
        return self._in_torch[0]

    def exact(self) -> Any:
        """Load the encoder as PyTorch runs it, in float32, from the checkpoint's own weights."""
        return _load_encoder(self.name_or_path)


def _load_encoder(folder: str) -> Any:
    """Load a transformers encoder in float32; its weights stay in the file until they are used."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def _from_cache(ov: Any, entry: Path, folder: str, dtype: str) -> Any:
    """Read converted layers, mapped from the cache; convert them where they are not whole."""
    from filelock import FileLock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(f"{entry.name}.lock")):
            if not _is_whole(entry):
                logger.info("Converting the encoder to %s for OpenVINO, into %s", dtype, entry)
                _convert(ov, entry, folder, dtype)
            return ov.Core().read_model(entry / "model.xml")
    except OSError as error:
        logger.warning(
            "The converted model cannot be kept in %s (%s), so every start converts it anew. "
            "Pass a folder that can be written to as `cache_folder`.",
            entry.parent,
            error,
        )
        return build_graph(_load_encoder(folder), dtype)


def _convert(ov: Any, entry: Path, folder: str, dtype: str) -> None:
    shutil.rmtree(entry, ignore_errors=True)  # not overwritten: another process may have it mapped
    entry.mkdir()
    graph = build_graph(_load_encoder(folder), dtype)
    ov.save_model(graph, entry / "model.xml", compress_to_fp16=False)
    (entry / "sums.json").write_text(json.dumps(_sums(entry)))


def _is_whole(entry: Path) -> bool:
    try:
        expected = json.loads((entry / "sums.json").read_bytes())
        return bool(expected == _sums(entry))
    except (FileNotFoundError, ValueError):  # not JSON
        return False


def _sums(entry: Path) -> dict[str, str]:
    sums = {}
    for name in _FILES:
        digest = hashlib.sha256()
        with (entry / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        sums[name] = digest.hexdigest()
    return sums
