"""One loaded model for all instances with equal settings, freed with the last of them.

Puts checkpoint, encoder and scheduler together. Knows no LangChain.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_bge_dense import _loading
from langchain_bge_dense._checkpoint import HEADS, Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from FlagEmbedding import BGEM3FlagModel

    from langchain_bge_dense._encoder import Encoder, Signals
    from langchain_bge_dense._jobs import Job


class Settings(NamedTuple):
    """What decides which model is loaded and how."""

    model: str
    revision: str | None
    token: str | None
    cache_folder: str | None
    local_files_only: bool
    device: str
    dtype: str
    backend: str
    pooling: str

    def checkpoint(self) -> Checkpoint:
        """Find the files, download them if need be, and read what they say."""
        folder = _loading.find_folder(
            self.model,
            revision=self.revision,
            token=self.token,
            cache_folder=self.cache_folder,
            local_files_only=self.local_files_only,
        )
        return read_checkpoint(folder, Path(self.model).name or folder.name)


class Engine:
    """A loaded model and the thread that runs it.

    Args:
        checkpoint: What was loaded.
        encoder: Runs it.
    """

    def __init__(self, checkpoint: Checkpoint, encoder: Encoder) -> None:
        from langchain_bge_dense._scheduler import Scheduler

        self.checkpoint = checkpoint
        self.encoder = encoder
        self._scheduler = Scheduler(encoder)
        # The thread holds the encoder; it ends when nobody holds the engine any more.
        weakref.finalize(self, self._scheduler.stop).atexit = False

    def signals(
        self, *, dense: bool = True, lexical: bool = False, colbert: bool = False
    ) -> Signals:
        """Outputs to ask for.

        Raises:
            ValueError: None is asked for, or the checkpoint has no heads for it.
        """
        from langchain_bge_dense._encoder import Signals

        if not (dense or lexical or colbert):
            msg = "No output is asked for. Set dense, lexical or colbert to True."
            raise ValueError(msg)
        if (lexical or colbert) and not self.checkpoint.has_heads:
            msg = (
                f"{self.checkpoint.name!r} is a dense-only checkpoint: {self.checkpoint.folder} "
                f"lacks {' or '.join(HEADS)}. Copy both there, or ask for dense vectors alone."
            )
            raise ValueError(msg)
        return Signals(dense=dense, lexical=lexical, colbert=colbert)

    def submit(self, job: Job) -> None:
        """Queue a job on the model's thread."""
        self._scheduler.submit(job)


_engines: weakref.WeakValueDictionary[Settings, Engine] = weakref.WeakValueDictionary()
_loading_lock = threading.Lock()


def shared_engine(settings: Settings, checkpoint: Checkpoint) -> Engine:
    """The engine of these settings, loaded if no instance has it yet."""
    with _loading_lock:
        engine = _engines.get(settings)
        if engine is None:
            engine = _engines[settings] = _load(settings, checkpoint)
        return engine


def _load(settings: Settings, checkpoint: Checkpoint) -> Engine:
    from langchain_bge_dense import _openvino
    from langchain_bge_dense._encoder import Encoder

    there = _openvino.is_installed()
    if settings.backend == "auto":
        there = there and _openvino.supports(checkpoint.folder)
    plan = _loading.make_plan(settings.device, settings.dtype, settings.backend, openvino=there)
    compiled = plan.backend == "openvino"
    flag = _loading.load_flag_model(
        checkpoint,
        pooling=checkpoint.pooling if settings.pooling == "auto" else settings.pooling,
        device=plan.device,
        dtype="float32" if compiled else plan.dtype,
    )
    if compiled:
        cache = _loading.cache_root(settings.cache_folder) / "openvino"
        _openvino.replace_encoder(flag, checkpoint.digest, plan.dtype, cache)
    return Engine(checkpoint, Encoder(flag, plan.device))


def wrap(flag: BGEM3FlagModel) -> tuple[Engine, dict[str, Any]]:
    """An engine around a model that its owner goes on using, and the fields that describe it.

    Raises:
        ValueError: The model's instruction formats put more than a text in front.
        FileNotFoundError: The checkpoint's files are no longer there.
    """
    from langchain_bge_dense._encoder import Encoder

    folder, device = _loading.settle_flag_model(flag)
    checkpoint = read_checkpoint(folder, Path(flag.model_name_or_path).name)
    passages = flag.kwargs.get("passage_instruction_for_retrieval")
    passage_format = flag.kwargs.get("passage_instruction_format", "{}{}")
    fields = {
        "model": flag.model_name_or_path,
        "device": device,
        "dtype": str(next(flag.model.parameters()).dtype).removeprefix("torch."),
        "backend": "torch",
        "pooling": flag.pooling_method,
        "normalize": flag.normalize_embeddings,
        "query_instruction": _instruction(
            flag.query_instruction_for_retrieval, flag.query_instruction_format
        ),
        "document_instruction": _instruction(passages, passage_format),
    }
    return Engine(checkpoint, Encoder(flag, device, shared=True)), fields


def _instruction(instruction: str | None, template: str) -> str:
    """What a `BGEM3FlagModel` puts in front of a text."""
    if not instruction:
        return ""
    prefix = template.format(instruction, "\0")
    if not prefix.endswith("\0"):
        msg = (
            f"The instruction format {template!r} puts text behind the query or passage, too. "
            'Use a format that ends in "{}".'
        )
        raise ValueError(msg)
    return prefix[:-1]


def _unlock_after_fork() -> None:
    global _loading_lock  # noqa: PLW0603 - a lock that another thread held is never let go here
    _loading_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)
