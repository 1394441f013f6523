"""`Engine`: one loaded model, shared by all instances with equal settings."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_bge_dense._engine import loading
from langchain_bge_dense._engine.calls import BaseEngine, check_text, result
from langchain_bge_dense._engine.checkpoint import Checkpoint, read_checkpoint
from langchain_bge_dense._engine.encoding import encoding_of
from langchain_bge_dense._engine.hub import HubSource, resolve
from langchain_bge_dense._engine.process import forkable_lock
from langchain_bge_dense._engine.scheduler import Request, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from FlagEmbedding import BGEM3FlagModel

    from langchain_bge_dense._engine.calls import Options
    from langchain_bge_dense._engine.encoder import Encoder
    from langchain_bge_dense._engine.encoding import M3Encoding, Outputs, Tokens


class Engine(BaseEngine):
    """A loaded model and the thread that runs it; `load` gives its encoder."""

    def __init__(
        self, checkpoint: Checkpoint, load: Callable[[], Encoder], device: str, dtype: str
    ) -> None:
        self.checkpoint = checkpoint
        self.device, self.dtype = device, dtype
        self.scheduler = Scheduler(load)
        # The thread holds the encoder; it ends when nobody holds the engine any more.
        weakref.finalize(self, self.scheduler.stop).atexit = False
        self.encoder = result(self.scheduler.loaded)

    def request(self, texts: list[str], first: int, outputs: Outputs, options: Options) -> Request:
        """Tokenise texts into a request for the scheduler."""
        if options.instruction and not self.checkpoint.modules.pools_prompt:
            msg = (
                f"{self.checkpoint.name!r} pools without the tokens of its prompt "
                "(include_prompt=false), which is not supported. Set query_instruction and "
                'document_instruction to "", or use sentence-transformers.'
            )
            raise ValueError(msg)
        tokens = self.encoder.tokenize(
            [options.instruction + text for text in texts], options.max_length
        )
        if options.on_truncate == "raise":
            _refuse_long(tokens, first, options.max_length)
        batch_tokens = options.batch_tokens or self.encoder.batch_tokens
        return Request(tokens, outputs, batch_tokens, first, options.urgent)

    def enqueue(self, request: Request) -> None:
        """Give a request to the scheduler."""
        self.scheduler.enqueue(request)

    def encoding(
        self, requests: Sequence[Request], outputs: Outputs, options: Options
    ) -> M3Encoding:
        """Join the rows of requests that have run."""
        return encoding_of(
            [tokens for request in requests for tokens in request.tokens],
            [row for request in requests for row in request.future.result()],
            outputs,
            dimension=self.checkpoint.dimension,
            max_length=options.max_length,
            unweighted=self.encoder.unweighted,
            normalize=options.normalize,
        )

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, without special ones."""
        return self.encoder.count(check_text(text, 0))

    def token_strings(self, weights: dict[int, float]) -> dict[str, float]:
        """Spell the tokens of lexical weights, the largest weight first."""
        return self.encoder.token_strings(weights)

    def token_spans(self, text: str) -> list[tuple[int, int, int]]:
        """List the tokens of a text in order: id, start and end."""
        return self.encoder.token_spans(text)


def _refuse_long(tokens: Sequence[Tokens], first: int, max_length: int) -> None:
    for index, text in enumerate(tokens, first):
        if text.total > max_length:
            msg = (
                f"Text {index} has {text.total:,} tokens, more than max_length={max_length:,}. "
                "Split it (count_tokens measures), raise max_length, or accept the cut with "
                'on_truncate="warn".'
            )
            raise ValueError(msg)


_engines: weakref.WeakValueDictionary[tuple[Any, ...], Engine] = weakref.WeakValueDictionary()
_loading_lock = forkable_lock()


def shared_engine(checkpoint: Checkpoint, device: str, dtype: str) -> Engine:
    """Load the engine of these settings, if no instance has it yet."""
    device, dtype = loading.resolve(device, dtype)
    settings = (checkpoint, device, dtype)
    with _loading_lock:
        engine = _engines.get(settings)
        if engine is None:
            load = partial(loading.load_encoder, checkpoint, device, dtype)
            engine = _engines[settings] = Engine(checkpoint, load, device, dtype)
        return engine


def wrap(flag: BGEM3FlagModel) -> tuple[Engine, dict[str, Any]]:
    """Make an engine around a model that its owner goes on using, and fields that describe it."""
    folder = resolve(HubSource(flag.model.model.name_or_path, local_files_only=True))
    checkpoint = read_checkpoint(folder, Path(flag.model_name_or_path).name, flag.pooling_method)
    if checkpoint.modules.layers or checkpoint.modules.lower_case:
        msg = (
            f"BGEM3FlagModel ignores the modules after pooling, or the lower-casing, that {folder} "
            "asks for. Use BGEM3Embeddings(model=...), which applies them."
        )
        raise ValueError(msg)
    device, dtype = loading.placement(flag)
    load = partial(loading.wrap_flag_model, flag, checkpoint, device, dtype)
    passages = flag.kwargs.get("passage_instruction_for_retrieval")
    fields = {
        "model": flag.model_name_or_path,
        "device": device,
        "dtype": dtype,
        "pooling": flag.pooling_method,
        "normalize": flag.normalize_embeddings,
        "query_instruction": _instruction(
            flag.query_instruction_for_retrieval, flag.query_instruction_format
        ),
        "document_instruction": _instruction(
            passages, flag.kwargs.get("passage_instruction_format", "{}{}")
        ),
    }
    return Engine(checkpoint, load, device, dtype), fields


def _instruction(instruction: str | None, template: str) -> str:
    """Take the text that a `BGEM3FlagModel` puts in front from its template."""
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
