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
from langchain_bge_dense._engine.encoder import Encoder, Heads, TextTokenizer
from langchain_bge_dense._engine.files import Parsing, shapes, tensors_of, weight_files
from langchain_bge_dense._engine.flag import flag_model_class
from langchain_bge_dense._engine.layers import (
    MODEL_TYPES,
    PackedEncoder,
    PaddedEncoder,
    Shape,
    converted,
    module_weights,
)
from langchain_bge_dense._engine.linear import LinearFactory, cpu_is_fast_in_bf16
from langchain_bge_dense._engine.packed import PackedFile, cache_folder
from langchain_bge_dense._engine.process import forkable_lock
from langchain_bge_dense._engine.weights import CheckpointWeights

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
        dtype: `"auto"` (float16 on CUDA and MPS; on a CPU bfloat16 where it is faster than
            float32, else this one), `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`.

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
            f"PyTorch {torch.__version__} does not find device {device!r} on this machine. "
            'Use device="auto" or "cpu", or install a PyTorch build for that device.'
        )
        raise ValueError(msg)
    if dtype == "int8" and kind != "cpu":
        msg = (
            f'dtype="int8" runs on a CPU alone, not on device {device!r}. '
            'Use device="cpu", or another dtype.'
        )
        raise ValueError(msg)
    if dtype == "auto":
        dtype = "float16" if kind != "cpu" else "bfloat16" if cpu_is_fast_in_bf16() else "float32"
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
    linear = _linear(device, dtype)
    folder = cache_folder()
    file = None
    if folder is not None and linear.device.type == "cpu":
        file = PackedFile(folder, checkpoint, dtype, linear)
    loaded = file and file.load()
    tokenizer, layers = loaded or _load_checked(checkpoint, dtype, linear, file)
    heads = [tensors_of(checkpoint.folder / head) for head in HEADS if checkpoint.has_heads]
    encoder = _encoder(checkpoint, tokenizer, layers, heads, dtype, linear)
    if dtype != "float32":
        encoder.reference = partial(load_encoder, checkpoint, device, "float32")
    return encoder


def _load_checked(
    checkpoint: Checkpoint, dtype: str, linear: LinearFactory, file: PackedFile | None
) -> tuple[TextTokenizer, torch.nn.Module]:
    """Load by transformers and FlagEmbedding with every check, and write the packed file."""
    flag = _load_flag_model(checkpoint)
    tokenizer, encoder = _tokenizer(flag.tokenizer, checkpoint), flag.model.model
    if not PackedEncoder.supports(encoder.config):
        _refuse_int8(dtype, encoder.config.model_type)
        return tokenizer, _padded(encoder, flag.tokenizer, linear, release=True)
    shape = Shape.of(encoder)
    weights = CheckpointWeights.find(checkpoint.folder, encoder) or module_weights(encoder)
    del flag, encoder
    if file is not None:
        file.write(tokenizer, shape, weights)
        if loaded := file.load():
            return loaded
    return tokenizer, PackedEncoder(shape, converted(weights, linear), linear)


def placement(flag: BGEM3FlagModel) -> tuple[str, str]:
    """Find device and dtype of a caller's own model.

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
        linear = _linear(device, dtype)
        encoder = model.model
        if PackedEncoder.supports(encoder.config):
            weights = converted(module_weights(encoder), linear)
            layers: torch.nn.Module = PackedEncoder(Shape.of(encoder), weights, linear)
        else:
            layers = _padded(encoder, tokenizer, linear, release=False)
        heads = []
        if checkpoint.has_heads:
            heads = [head.state_dict() for head in (model.colbert_linear, model.sparse_linear)]
        text_tokenizer = _tokenizer(tokenizer, checkpoint)
        return _encoder(checkpoint, text_tokenizer, layers, heads, dtype, linear)

    encoder = build(flag.model, dtype)
    if dtype != "float32":
        encoder.reference = lambda: build(copy.deepcopy(flag.model).float(), "float32")
    return encoder


def _linear(device: str, dtype: str) -> LinearFactory:
    return LinearFactory(dtype, torch.device(device), _state_dtype(dtype))


def _tokenizer(tokenizer: Any, checkpoint: Checkpoint) -> TextTokenizer:
    if checkpoint.modules.lower_case:
        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = Sequence([Lowercase(), *own])
    return TextTokenizer.of(tokenizer)


def _padded(encoder: Any, tokenizer: Any, linear: LinearFactory, *, release: bool) -> PaddedEncoder:
    module = _cast(encoder.to(linear.device).eval(), linear.state_dtype, release=release)
    return PaddedEncoder(module, tokenizer.pad_token_id)


def _encoder(  # noqa: PLR0913, PLR0917
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    layers: torch.nn.Module,
    weights: list[dict[str, Tensor]],
    dtype: str,
    linear: LinearFactory,
) -> Encoder:
    """Assemble an encoder. `weights` are those of the heads in `HEADS`, if there are any."""
    modules, device = checkpoint.modules, linear.device
    heads = Heads(modules.pooling, [_behind_pooling(layer, device) for layer in modules.layers])
    if weights:
        colbert, lexical = weights
        narrow = LinearFactory(str(linear.state_dtype).removeprefix("torch."), device)
        heads.lexical = LinearFactory("float32", device)(lexical["weight"], lexical["bias"])
        heads.colbert = narrow(colbert["weight"], colbert["bias"])
    return Encoder(tokenizer, layers, heads, batch_tokens=_batch_tokens(device.type, dtype))


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


def _behind_pooling(layer: Dense | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the dense layer behind the pooling, `(B, D)` to `(B, D')`, or normalize without one."""
    if layer is None:
        return F.normalize
    [file] = weight_files(layer.folder)
    tensors = {name: t.to(device, torch.float32, copy=True) for name, t in tensors_of(file).items()}
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
        return torch.bfloat16 if cpu_is_fast_in_bf16() else torch.float32
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
