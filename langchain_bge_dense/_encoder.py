"""Token ids in, the three BGE-M3 signals out: the only module that runs the model.

Drives the tokenizer, the transformers encoder and the heads of a `BGEM3FlagModel` by themselves.
Knows no LangChain, no hub and no threads: one thread at a time may call `forward` and `collect`.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from langchain_bge_dense._openvino import OpenVinoEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from FlagEmbedding import BGEM3FlagModel
    from numpy.typing import NDArray
    from torch import Tensor

# Padded tokens per forward pass. CPU: activations stay in the cache (benchmarks/README.md).
BATCH_TOKENS = {"cpu": 512, "openvino": 1_024, "mps": 8_192, "cuda": 65_536}

_TOKENIZER_CHUNK = 256


@dataclass(frozen=True)
class Signals:
    """Which outputs of one forward pass are wanted."""

    dense: bool = True
    lexical: bool = False
    colbert: bool = False

    def __or__(self, other: Signals) -> Signals:
        return Signals(
            self.dense or other.dense,
            self.lexical or other.lexical,
            self.colbert or other.colbert,
        )


class Tokens(NamedTuple):
    """One tokenised text."""

    ids: NDArray[np.int32]  # (T,), special tokens included, cut to the maximum length
    total: int  # before the cut


class Row(NamedTuple):
    """One text's outputs, views of its batch on the device, not normalised."""

    dense: Tensor | None  # (D,)
    weights: Tensor | None  # (T,)
    colbert: Tensor | None  # (T - 1, D)


class Vectors(NamedTuple):
    """Outputs of several texts in NumPy, not normalised."""

    dense: NDArray[np.float32] | None  # (N, D)
    weights: list[NDArray[np.float32]] | None  # N times (T_i,)
    colbert: list[NDArray[np.float32]] | None  # N times (T_i - 1, D)


class Encoder:
    """A loaded `BGEM3FlagModel`, driven batch by batch.

    Args:
        flag: The model, on its device and in its dtype.
        device: Where batches go.
        shared: Whether the caller goes on using `flag` itself, so that its tokenizer is copied.
    """

    def __init__(self, flag: BGEM3FlagModel, device: str, *, shared: bool = False) -> None:
        self._model = flag.model
        self._device = torch.device(device)
        self.tokenizer = flag.tokenizer
        backend = flag.tokenizer.backend_tokenizer
        self._backend = copy.deepcopy(backend) if shared else backend
        # Settings that never change again make the tokenizer safe to call from several threads.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encode_batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        probe = self._backend.encode("a").special_tokens_mask
        self._suffix = len(probe) - 1 - max(i for i, special in enumerate(probe) if not special)
        self.unweighted = _unweighted(flag.tokenizer)

    @property
    def batch_tokens(self) -> int:
        """The default budget of padded tokens per forward pass on this device."""
        kind = "openvino" if isinstance(self._model.model, OpenVinoEncoder) else self._device.type
        return BATCH_TOKENS.get(kind, BATCH_TOKENS["cpu"])

    def count(self, text: str) -> int:
        """Number of tokens of a text, special tokens left out."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def named(self, weights: dict[int, float]) -> dict[str, float]:
        """Lexical weights by token string, the largest first.

        Where two tokens read the same, the lighter one goes by its form in the vocabulary.
        """
        names: dict[str, float] = {}
        for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
            name = self.tokenizer.decode([token])
            if name in names:
                name = self.tokenizer.convert_ids_to_tokens(token)
            names[name] = weight
        return names

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Tokenise texts, special tokens included, and cut them as the tokenizer itself would."""
        tokens = []
        for start in range(0, len(texts), _TOKENIZER_CHUNK):
            chunk = list(texts[start : start + _TOKENIZER_CHUNK])
            tokens += [
                self._cut(encoding.ids, max_length) for encoding in self._encode_batch(chunk)
            ]
        return tokens

    def _cut(self, ids: list[int], max_length: int) -> Tokens:
        count = len(ids)
        if count > max_length:
            ids = ids[: max_length - self._suffix] + ids[count - self._suffix :]
        return Tokens(np.array(ids, dtype=np.int32), count)

    def forward(self, batch: Sequence[NDArray[np.int32]], signals: Signals) -> list[Row]:
        """Run one batch; out of memory, run its halves.

        Args:
            batch: Token ids of B texts, each `(T_i,)`.
            signals: What to compute.

        Returns:
            B rows, on the device.
        """
        try:
            return self._forward(batch, signals)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        return [*self.forward(batch[:half], signals), *self.forward(batch[half:], signals)]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[NDArray[np.int32]], signals: Signals) -> list[Row]:
        lengths = [len(ids) for ids in batch]
        ids, mask = self._pad(batch, lengths)
        hidden = self._model.model(
            input_ids=ids, attention_mask=mask, return_dict=True
        ).last_hidden_state  # (B, T, D)
        dense, weights, colbert = self._heads(hidden, ids, mask, signals)
        return [
            Row(
                None if dense is None else dense[i],
                None if weights is None else weights[i, :length],
                None if colbert is None else colbert[i, : length - 1],
            )
            for i, length in enumerate(lengths)
        ]

    def _heads(
        self, hidden: Tensor, ids: Tensor, mask: Tensor, signals: Signals
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The outputs asked for, in float32; FlagEmbedding has no public names for its heads."""
        model = self._model
        dense = weights = colbert = None
        if signals.dense:
            dense = model._dense_embedding(hidden, mask).float()  # noqa: SLF001 (B, D)
        if signals.lexical:
            states = hidden.to(model.sparse_linear.weight.dtype)
            weights = model._sparse_embedding(states, ids, return_embedding=False)  # noqa: SLF001
            weights = weights.squeeze(-1).float()  # (B, T)
        if signals.colbert:
            states = hidden.to(model.colbert_linear.weight.dtype)
            colbert = model._colbert_embedding(states, mask).float()  # noqa: SLF001 (B, T - 1, D)
        return dense, weights, colbert

    def _pad(self, batch: Sequence[NDArray[np.int32]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        ids = np.full((len(batch), max(lengths)), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, text in zip(ids, batch, strict=True):
            row[: len(text)] = text
        mask = (np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int64)  # (B, T)
        return torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)

    def collect(
        self, rows: Sequence[Row], batch: Sequence[NDArray[np.int32]], first: int = 0
    ) -> Vectors:
        """Copy rows to the host at once; compute again in float32 what is not finite.

        Args:
            rows: What `forward` gave for N texts with the same signals.
            batch: Their token ids.
            first: The caller's index of the first text, for the error.

        Raises:
            FloatingPointError: A vector is not finite in float32 either.
        """
        vectors = to_host(rows)
        bad = np.flatnonzero(~_finite(vectors)).tolist()
        if not bad:
            return vectors
        exact = list(rows)
        with self._in_float32():
            for index in bad:
                exact[index] = self._again(rows[index], batch[index], first + index)
        return to_host(exact)

    def _again(self, row: Row, ids: NDArray[np.int32], index: int) -> Row:
        """Run one text once more, for the same signals as a row that it had."""
        signals = Signals(*(output is not None for output in row))
        again = self._forward([ids], signals)
        if _finite(to_host(again)).all():
            return again[0]
        msg = (
            f"Text {index} has a vector that is not finite, in float32 too. "
            "The checkpoint's weights are damaged or overflow: download the model again."
        )
        raise FloatingPointError(msg)

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        encoder, dtype = self._model.model, next(self._model.parameters()).dtype
        if isinstance(encoder, OpenVinoEncoder):
            self._model.model = encoder.exact()
        self._model.float()
        try:
            yield
        finally:
            self._model.model = encoder
            self._model.to(dtype)  # back without loss: these weights came from that dtype


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device's or the system's "no memory left".

    >>> is_out_of_memory(RuntimeError("MPS backend out of memory"))
    True
    >>> is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    False
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower()
    return any(
        words in message for words in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def to_host(rows: Sequence[Row]) -> Vectors:
    """Bring rows of the same signals to NumPy, one copy per signal."""
    dense, weights, colbert = zip(*rows, strict=True)
    return Vectors(
        None if dense[0] is None else torch.stack(dense).cpu().numpy(),  # (N, D)
        None if weights[0] is None else _split(weights),
        None if colbert[0] is None else _split(colbert),
    )


def _split(parts: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(torch.cat(list(parts)).cpu().numpy(), ends)


def _finite(vectors: Vectors) -> NDArray[np.bool_]:
    """Which texts have finite outputs only, `(N,)`."""
    outputs = [output for output in vectors if output is not None]
    return np.array(
        [all(np.isfinite(part).all() for part in parts) for parts in zip(*outputs, strict=True)]
    )


def _unweighted(tokenizer: Any) -> NDArray[np.int32]:
    names = ("cls_token", "eos_token", "pad_token", "unk_token")
    tokens = [tokenizer.special_tokens_map.get(name) for name in names]
    ids = tokenizer.convert_tokens_to_ids([token for token in tokens if token is not None])
    return np.array(ids, dtype=np.int32)
