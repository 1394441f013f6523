"""From a hub id or a folder to a `BGEM3FlagModel` on a device, in a dtype.

The only module that knows devices and dtypes. Knows no LangChain and runs no text.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_bge_dense._checkpoint import TOKENIZERS, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from FlagEmbedding import BGEM3FlagModel

    from langchain_bge_dense._checkpoint import Checkpoint

# The hub's library reads it once, at its import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def choose_device(device: str, *, cuda: bool, mps: bool) -> str:
    """Resolve `"auto"` to the best device there is.

    >>> choose_device("auto", cuda=False, mps=False)
    'cpu'
    >>> choose_device("cuda:1", cuda=True, mps=False)
    'cuda:1'
    """
    if device == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    return "cpu" if device.startswith("cpu:") else device


def choose_dtype(dtype: str, device: str, backend: str, *, bf16: bool) -> str:
    """Resolve `"auto"` to the fastest dtype that keeps the quality.

    Args:
        dtype: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`.
        device: A resolved device.
        backend: A resolved backend.
        bf16: Whether the CPU multiplies bfloat16 in hardware.

    >>> choose_dtype("auto", "cuda", "torch", bf16=False)
    'float16'
    >>> choose_dtype("auto", "cpu", "torch", bf16=True)
    'bfloat16'

    Raises:
        ValueError: The backend cannot run the dtype.
    """
    if dtype == "int8" and backend != "openvino":
        msg = (
            f'dtype="int8" was asked for with the {backend} backend on {device!r}, and only the '
            'OpenVINO backend has it. Use backend="openvino" on a CPU, or another dtype.'
        )
        raise ValueError(msg)
    if dtype == "float16" and backend == "openvino":
        msg = (
            'dtype="float16" was asked for, and the OpenVINO backend has none on a CPU. '
            'Use dtype="auto", "float32", "bfloat16" or "int8".'
        )
        raise ValueError(msg)
    if dtype != "auto":
        return dtype
    if not device.startswith("cpu"):
        return "float16"
    return "bfloat16" if bf16 else "float32"


class Plan(NamedTuple):
    """Where and how a model runs."""

    device: str
    dtype: str
    backend: str


def choose_backend(backend: str, device: str, *, openvino: bool) -> str:
    """Resolve `"auto"` to OpenVINO on a CPU where it is installed, else to PyTorch.

    >>> choose_backend("auto", "cpu", openvino=True), choose_backend("auto", "cuda", openvino=True)
    ('openvino', 'torch')

    Raises:
        ImportError: OpenVINO was asked for and is not installed.
        ValueError: OpenVINO was asked for on another device than the CPU.
    """
    if backend == "openvino" and device != "cpu":
        msg = (
            f'backend="openvino" was asked for on device {device!r}, and it runs on a CPU only. '
            'Use device="cpu", or backend="torch".'
        )
        raise ValueError(msg)
    if backend == "openvino" and not openvino:
        msg = (
            'backend="openvino" was asked for, and OpenVINO is not installed. '
            'Run `pip install "langchain-bge-dense[openvino]"`, or use backend="torch".'
        )
        raise ImportError(msg)
    if backend == "auto":
        return "openvino" if openvino and device == "cpu" else "torch"
    return backend


def make_plan(device: str, dtype: str, backend: str, *, openvino: bool) -> Plan:
    """Resolve every `"auto"` for this machine.

    Args:
        device: `"auto"` or a torch device.
        dtype: `"auto"` or a dtype.
        backend: `"auto"`, `"torch"` or `"openvino"`.
        openvino: Whether OpenVINO is installed.

    Raises:
        ValueError: The device is not on this machine, or cannot run the backend or the dtype.
        ImportError: OpenVINO was asked for and is not installed.
    """
    import torch

    device = choose_device(
        device, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available()
    )
    _require_device(device)
    backend = choose_backend(backend, device, openvino=openvino)
    return Plan(device, choose_dtype(dtype, device, backend, bf16=cpu_has_bf16()), backend)


def _require_device(device: str) -> None:
    import torch

    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, ImportError):  # as PyTorch was built
        usable = False
    if not usable:
        msg = (
            f"PyTorch {torch.__version__} finds no device {device!r} on this machine. "
            'Use device="auto" or "cpu", or install a PyTorch build for that device.'
        )
        raise ValueError(msg)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, and PyTorch makes use of it.

    Without, PyTorch emulates bfloat16, slower than float32.
    """
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch, which knows no Arm
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    units = map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16"))
    return any(units) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def find_folder(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find a local folder, or download what is needed of a hub checkpoint.

    Returns:
        The folder that holds the files.

    Raises:
        FileNotFoundError: No such folder, no such model on the hub, or no way to reach it.
        PermissionError: The hub does not give the model to the holder of this token.
        ConnectionError: The download broke off.
        ValueError: `model` is not a valid hub id, or a file in the cache leads out of it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or not _is_hub_id(model):
        msg = (
            f"There is no model folder {model!r} (looked in {folder.absolute()}). Correct the "
            "path, or pass a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    from langchain_bge_dense import _hub

    return _hub.download(
        model,
        revision=revision,
        token=token,
        cache_folder=cache_folder,
        local_files_only=local_files_only,
    )


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII) is not None


def load_flag_model(
    checkpoint: Checkpoint, *, pooling: str, device: str, dtype: str
) -> BGEM3FlagModel:
    """Load a checkpoint's weights.

    Args:
        checkpoint: What `read_checkpoint` gave.
        pooling: `"cls"` or `"mean"`.
        device: A resolved torch device.
        dtype: A resolved dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Returns:
        FlagEmbedding's model, on the device and in the dtype, in evaluation mode.

    Raises:
        ValueError: A file is damaged or hostile, or the files belong to different models.
    """
    from FlagEmbedding import BGEM3FlagModel

    from langchain_bge_dense._weights import check_vocabulary, check_weights

    folder = checkpoint.folder
    tokenizer = next(folder / name for name in TOKENIZERS if (folder / name).exists())
    with quiet_transformers():
        check_weights(checkpoint)
        # What is left to go wrong is the tokenizer.
        with Reading(tokenizer, RuntimeError, ImportError):
            flag = BGEM3FlagModel(
                str(folder),
                use_fp16=dtype == "float16",
                use_bf16=dtype == "bfloat16",
                devices=device,
                pooling_method=pooling,
            )
    embeddings = flag.model.model.get_input_embeddings()
    check_vocabulary(flag.tokenizer, embeddings.num_embeddings, folder)
    flag.model.to(device).eval()
    return flag


def cache_root(cache_folder: str | None) -> Path:
    """The folder of this package in the caller's cache, or in the user's own."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_folder or user).expanduser() / "langchain-bge-dense"


def settle_flag_model(flag: BGEM3FlagModel) -> tuple[Path, str]:
    """Bring a caller's own model to its first device, in a dtype that runs there.

    Returns:
        Its checkpoint folder and that device.
    """
    device = str(flag.target_devices[0])
    if device == "cpu":
        flag.model.float()  # as FlagEmbedding does at every encode
    flag.model.to(device).eval()
    return find_folder(flag.model.model.name_or_path, local_files_only=True), device


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' bar and its remarks on the pooler, which is not used."""
    from transformers.utils import logging as transformers_logging_module

    transformers_logging: Any = transformers_logging_module

    level, bar = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
