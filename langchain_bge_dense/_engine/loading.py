"""From a checkpoint to an `Encoder` on a device, in a dtype: the only module that knows both."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from tokenizers.normalizers import Lowercase, Sequence

from langchain_bge_dense._engine.checkpoint import (
    ENCODERS_OF_PAIRS,
    HEADS,
    TOKENIZERS,
    Checkpoint,
    check_vocabulary,
    check_weights,
)
from langchain_bge_dense._engine.encoder import Encoder, Heads
from langchain_bge_dense._engine.files import Parsing, shapes, tensors_of, weight_files
from langchain_bge_dense._engine.flag import flag_model_class
from langchain_bge_dense._engine.layers import MODEL_TYPES, PackedEncoder, PaddedEncoder
from langchain_bge_dense._engine.linear import LinearFactory, cpu_has_bf16
from langchain_bge_dense._engine.locks import forkable_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from FlagEmbedding import BGEM3FlagModel
    from torch import Tensor

    from langchain_bge_dense._engine.modules import Dense

# Tokens per forward pass: benchmarks/budget.py measures them, benchmarks/README.md tells how.
# A query waits for one batch at most: on a CPU larger ones gain little.
_BATCH_TOKENS = {"cpu": 512, "cpu with AMX": 1_024, "mps": 8_192, "cuda": 65_536}

_FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve(device: str, dtype: str) -> tuple[str, str]:
    """Replace `"auto"` by what is best on this machine.

    Args:
        device: `"auto"` (CUDA, then MPS, then CPU) or a torch device.
        dtype: `"auto"` (float16 on CUDA and MPS; on a CPU bfloat16 where it has it in hardware,
            else float32), `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`.

    Raises:
        ValueError: The device is not on this machine, or cannot run the dtype.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, ImportError):  # as PyTorch was built
        kind = "meta"
    if kind == "meta":
        msg = (
            f"PyTorch {torch.__version__} finds no device {device!r} on this machine. "
            'Use device="auto" or "cpu", or install a PyTorch build for that device.'
        )
        raise ValueError(msg)
    if dtype == "int8" and kind != "cpu":
        msg = (
            f'dtype="int8" was asked for on device {device!r}, and only a CPU runs it. '
            'Use device="cpu", or another dtype.'
        )
        raise ValueError(msg)
    if dtype == "auto":
        dtype = "float16" if kind != "cpu" else "bfloat16" if cpu_has_bf16() else "float32"
    return ("cpu" if kind == "cpu" else device), dtype


def load_encoder(checkpoint: Checkpoint, device: str, dtype: str) -> Encoder:
    """Load a checkpoint.

    Args:
        checkpoint: What `read_checkpoint` gave.
        device: A resolved torch device.
        dtype: A resolved dtype.

    Raises:
        ValueError: A file is damaged or hostile, the files belong to different models, or the
            dtype does not run this type of model.
    """
    flag = _load_flag_model(checkpoint)
    encoder = _build_encoder(
        flag.tokenizer, flag.model, checkpoint, device=device, dtype=dtype, release=True
    )
    if dtype != "float32":
        encoder.reference = partial(load_encoder, checkpoint, device, "float32")
    return encoder


def placement(flag: BGEM3FlagModel) -> tuple[str, str]:
    """Device and dtype of a caller's own model.

    Its first device, and its own dtype, but on a CPU float32, to which FlagEmbedding brings it at
    every `encode`.
    """
    device = str(flag.target_devices[0])
    own = str(next(flag.model.parameters()).dtype).removeprefix("torch.")
    return device, "float32" if device == "cpu" else own


def wrap_flag_model(
    flag: BGEM3FlagModel, checkpoint: Checkpoint, device: str, dtype: str
) -> Encoder:
    """Make an encoder of a model that its owner goes on using."""

    def build(model: Any, dtype: str) -> Encoder:
        tokenizer = copy.deepcopy(flag.tokenizer)  # FlagEmbedding changes its settings
        return _build_encoder(
            tokenizer, model, checkpoint, device=device, dtype=dtype, release=False
        )

    encoder = build(flag.model, dtype)
    if dtype != "float32":
        encoder.reference = lambda: build(copy.deepcopy(flag.model).float(), "float32")
    return encoder


def _build_encoder(  # noqa: PLR0913
    tokenizer: Any, model: Any, checkpoint: Checkpoint, *, device: str, dtype: str, release: bool
) -> Encoder:
    """Rebuild FlagEmbedding's module `model` on a device and in a dtype."""
    place = torch.device(device)
    state_dtype = _state_dtype(dtype)
    modules = checkpoint.modules
    if modules.lower_case:
        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = Sequence([Lowercase(), *own])
    layers = [_behind_pooling(layer, place) for layer in modules.layers]
    heads = Heads(model.sentence_pooling_method, layers)
    if checkpoint.has_heads:
        lexical, colbert = model.sparse_linear, model.colbert_linear
        heads.lexical = LinearFactory("float32", place)(lexical.weight, lexical.bias)
        narrow = LinearFactory(str(state_dtype).removeprefix("torch."), place)
        heads.colbert = narrow(colbert.weight, colbert.bias)
    if PackedEncoder.supports(model.model.config):
        encoder: Any = PackedEncoder(model.model, dtype, state_dtype, place, release=release)
    else:
        _refuse_int8(dtype, model.model.config.model_type)
        module = _cast(model.model.to(place).eval(), state_dtype, release=release)
        encoder = PaddedEncoder(module, tokenizer.pad_token_id)
    return Encoder(tokenizer, encoder, heads, batch_tokens=_batch_tokens(place.type, dtype))


def _cast(module: Any, dtype: torch.dtype, *, release: bool) -> Any:
    """Cast the parameters of a transformers module, as transformers itself does while loading.

    Buffers stay in float32, such as the frequencies of rotary positions, and so do parameters that
    the module keeps in it. With `release`, all are copied: a tensor that needed no conversion would
    keep the file mapped.
    """
    exact = {*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        exact |= {*(getattr(module, "_keep_in_fp32_modules", None) or ())}
    for name, weight in module.named_parameters():
        kept = exact and not exact.isdisjoint(name.split("."))
        weight.data = weight.data.to(weight.dtype if kept else dtype, copy=release)
    return module


def _behind_pooling(layer: Dense | None, place: torch.device) -> Callable[[Tensor], Tensor]:
    """A layer behind the pooling, `(B, D)` to `(B, D')`, in float32; None: to unit length."""
    if layer is None:
        return F.normalize
    [file] = weight_files(layer.folder)
    tensors = {name: t.to(place, torch.float32, copy=True) for name, t in tensors_of(file).items()}
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias")
    residual, is_residual = tensors.get("residual.weight"), layer.residual
    activation = getattr(torch.nn, layer.activation)()

    def project(pooled: Tensor) -> Tensor:
        projected: Tensor = activation(F.linear(pooled, weight, bias))  # (B, D')
        if not is_residual:
            return projected
        return projected + (pooled if residual is None else F.linear(pooled, residual))

    return project


def _batch_tokens(device: str, dtype: str) -> int:
    # Passes over int8's activations cost more once these fall out of the cache.
    amx = (device, dtype) == ("cpu", "bfloat16") and torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return _BATCH_TOKENS.get("cpu with AMX" if amx else device, _BATCH_TOKENS["cpu"])


def _state_dtype(dtype: str) -> torch.dtype:
    if dtype == "int8":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    return _FLOATS[dtype]


def _refuse_int8(dtype: str, model_type: str) -> None:
    if dtype == "int8":
        msg = (
            f'dtype="int8" cannot run an encoder of type {model_type!r}, only '
            f'{", ".join(MODEL_TYPES)} with GELU. Use dtype="auto".'
        )
        raise ValueError(msg)


def _load_flag_model(checkpoint: Checkpoint) -> BGEM3FlagModel:
    """Load weights in float32, mapped from their file where it is safetensors."""
    folder = checkpoint.folder
    tokenizer = next(folder / name for name in TOKENIZERS if (folder / name).exists())
    with _quiet_transformers():
        check_weights(checkpoint)
        # What is left to go wrong is the tokenizer.
        with Parsing(tokenizer, RuntimeError, ImportError):
            flag = flag_model_class()(
                str(folder),
                use_fp16=False,
                devices="cpu",
                pooling_method=checkpoint.modules.pooling,
                colbert_dim=_colbert_width(checkpoint),
            )
    _require_fast(flag.tokenizer, folder)
    if flag.model.config.model_type in ENCODERS_OF_PAIRS:
        flag.model.model = flag.model.model.get_encoder()
    rows = flag.model.model.get_input_embeddings().num_embeddings
    check_vocabulary(flag.tokenizer, rows, folder)
    flag.model.eval()
    return flag


def _colbert_width(checkpoint: Checkpoint) -> int:
    if not checkpoint.has_heads:
        return -1
    width: int = shapes(checkpoint.folder / HEADS[0])["weight"][0]
    return width


def _require_fast(tokenizer: Any, folder: Path) -> None:
    if not tokenizer.is_fast:
        msg = (
            f"The tokenizer in {folder} is {type(tokenizer).__name__}, written in Python alone, "
            "and a fast one is needed. Make its tokenizer.json with convert_slow_tokenizer of "
            "transformers.convert_slow_tokenizer, or take a checkpoint that has one."
        )
        raise ValueError(msg)


_quiet_lock = forkable_lock()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' bar and its remarks on the pooler, which is not used.

    One thread at a time: these settings are of the whole process.
    """
    # Where another thread is importing it for the first time this waits; names taken from it
    # meanwhile (`from transformers import`) would come from a module that it replaces at its end.
    import transformers  # noqa: F401
    from transformers.utils import logging as transformers_logging_module

    transformers_logging: Any = transformers_logging_module
    with _quiet_lock:
        level = transformers_logging.get_verbosity()
        bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bar:
                transformers_logging.enable_progress_bar()
