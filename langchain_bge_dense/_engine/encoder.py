"""Token ids in, the three outputs of BGE-M3 out: the only module that runs the model."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from langchain_bge_dense._engine.encoding import Outputs, TextOutputs, Tokens
from langchain_bge_dense._engine.process import tokenizers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

logger = logging.getLogger(__name__)

_TOKENIZER_CHUNK = 256
_WORD_START = "▁"  # SentencePiece's, of no width where it is a token by itself
_OVERFLOW = (
    "%d of a batch's %d texts have non-finite values in this dtype and are computed again in "
    'float32, for which the model is loaded anew. With many of them use dtype="float32".'
)


class TextTokenizer(NamedTuple):
    """Parts of a transformers tokenizer that encoding needs.

    Attributes:
        backend: A `tokenizers.Tokenizer`, whose settings nobody changes any more.
        unweighted: Ids of tokens that have no lexical weight.
        cuts_left: Whether a long text loses its beginning.
    """

    backend: Any
    unweighted: list[int]
    cuts_left: bool

    @classmethod
    def of(cls, tokenizer: Any) -> TextTokenizer:
        """Read them from a fast tokenizer of transformers."""
        names = ("cls_token", "eos_token", "pad_token", "unk_token")
        tokens = [tokenizer.special_tokens_map.get(name) for name in names]
        ids = tokenizer.convert_tokens_to_ids([token for token in tokens if token is not None])
        return cls(tokenizer.backend_tokenizer, ids, tokenizer.truncation_side == "left")


class Encoder:
    """A loaded model, run batch by batch.

    `forward` is for one thread at a time, everything else for any thread.

    Args:
        tokenizer: Texts to token ids.
        layers: Token ids of B texts to their states, `(S, D)` float32.
        heads: States to outputs.
        batch_tokens: Tokens per forward pass that suit the device.

    Attributes:
        reference: Loads the same model in float32, for texts that have non-finite values in a
            narrower dtype; None where this is that model.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        layers: nn.Module,
        heads: Heads,
        *,
        batch_tokens: int,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.reference: Callable[[], Encoder] | None = None
        self.unweighted = np.array(tokenizer.unweighted, dtype=np.int32)
        self._layers = layers
        self._heads = heads
        self._backend = backend = tokenizer.backend
        # Settings that never change again make the tokenizer safe to call from several threads.
        backend.no_truncation()
        backend.no_padding()
        self._encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
        probe = backend.encode("a").special_tokens_mask
        content = [index for index, special in enumerate(probe) if not special]
        self._prefix, self._suffix = min(content), len(probe) - 1 - max(content)
        self._cuts_left = tokenizer.cuts_left

    def count(self, text: str) -> int:
        """Count the tokens of a text, without special ones."""
        return len(self._encode(text).ids)

    def token_strings(self, weights: dict[int, float]) -> dict[str, float]:
        """Spell the tokens of lexical weights, the largest weight first.

        Where two tokens read the same, the lighter one goes by its form in the vocabulary.
        """
        strings: dict[str, float] = {}
        for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
            string = self._backend.decode([token], skip_special_tokens=False)
            if string in strings:
                string = self._backend.id_to_token(token)
            strings[string] = weight
        return strings

    def token_spans(self, text: str) -> list[tuple[int, int, int]]:
        """List the tokens of a text in order: id, start and end."""
        encoded = self._encode(text)
        rows = zip(encoded.ids, encoded.offsets, encoded.tokens, strict=True)
        return [
            (token, start, start if string == _WORD_START else end)
            for token, (start, end), string in rows
        ]

    def _encode(self, text: str) -> Any:
        with tokenizers.use():
            return self._backend.encode(text, add_special_tokens=False)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Tokenise texts, special tokens included, and cut them as the tokenizer itself would."""
        tokens: list[Tokens] = []
        for start in range(0, len(texts), _TOKENIZER_CHUNK):
            chunk = list(texts[start : start + _TOKENIZER_CHUNK])
            with tokenizers.use():
                encodings = self._encode_batch(chunk)
            tokens += [self._cut(encoding.ids, max_length) for encoding in encodings]
        return tokens

    def _cut(self, ids: list[int], max_length: int) -> Tokens:
        count = len(ids)
        if count > max_length:
            kept = self._prefix if self._cuts_left else max_length - self._suffix
            ids = ids[:kept] + ids[count - max_length + kept :]
        return Tokens(np.array(ids, dtype=np.int32), count)

    def forward(
        self, batch: Sequence[NDArray[np.int32]], outputs: Outputs
    ) -> list[TextOutputs | None]:
        """Run one batch.

        Args:
            batch: Token ids of B texts, each `(T_i,)`.
            outputs: What to compute.

        Returns:
            B times the outputs of a text; None where one is non-finite in float32, too.
        """
        rows: list[TextOutputs | None] = [
            row if _is_finite(row) else None for row in self._forward_or_halve(batch, outputs)
        ]
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing and self.reference is not None:
            logger.warning(_OVERFLOW, len(missing), len(batch))
            again = self.reference().forward([batch[index] for index in missing], outputs)
            for index, row in zip(missing, again, strict=True):
                rows[index] = row
        return rows

    def _forward_or_halve(
        self, batch: Sequence[NDArray[np.int32]], outputs: Outputs
    ) -> list[TextOutputs]:
        try:
            return self._forward(batch, outputs)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(batch) // 2
        return [
            *self._forward_or_halve(batch[:half], outputs),
            *self._forward_or_halve(batch[half:], outputs),
        ]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[NDArray[np.int32]], outputs: Outputs) -> list[TextOutputs]:
        lengths = [len(ids) for ids in batch]
        states = self._layers(batch)  # (S, D)
        return self._heads.compute(states, lengths, outputs)


class Heads:
    """The three heads of BGE-M3 over packed states.

    Args:
        pooling: `"cls"` or `"mean"`, of the dense vector.
        layers: What follows the pooling, `(B, D)` to `(B, D')` float32.

    Attributes:
        lexical: D to 1; None for a dense-only checkpoint.
        colbert: D to D; None for a dense-only checkpoint.
    """

    def __init__(self, pooling: str, layers: Sequence[Callable[[Tensor], Tensor]] = ()) -> None:
        self._mean = pooling == "mean"
        self._layers = layers
        self.lexical: Callable[[Tensor], Tensor] | None = None
        self.colbert: Callable[[Tensor], Tensor] | None = None

    def compute(
        self, states: Tensor, lengths: Sequence[int], outputs: Outputs
    ) -> list[TextOutputs]:
        """Compute outputs.

        Args:
            states: `(S, D)`, float32.
            lengths: Tokens of each of the B texts.
            outputs: What to compute.

        Returns:
            B times the outputs of a text, in NumPy.
        """
        bounds = np.cumsum([0, *lengths])  # (B + 1,)
        dense = lexical = colbert = None
        if outputs.dense:
            pooled = self._pool(states, lengths, bounds)  # (B, D)
            for layer in self._layers:
                pooled = layer(pooled)
            dense = pooled.cpu().numpy()  # (B, D')
        if outputs.lexical and self.lexical is not None:
            lexical = self.lexical(states).float().relu().squeeze(1).cpu().numpy()  # (S,)
        if outputs.colbert and self.colbert is not None:
            colbert = self.colbert(states).float().cpu().numpy()  # (S, D)
        return [
            TextOutputs(
                None if dense is None else dense[index],
                None if lexical is None else lexical[start:stop],
                None if colbert is None else colbert[start + 1 : stop],
            )
            for index, (start, stop) in enumerate(pairwise(bounds))
        ]

    def _pool(self, states: Tensor, lengths: Sequence[int], bounds: NDArray[np.int64]) -> Tensor:
        if self._mean:
            return torch.stack(
                [part.mean(0) for part in torch.split(states, list(lengths))]
            )  # (B, D)
        return states[torch.from_numpy(bounds[:-1]).to(states.device)]  # (B, D): the cls tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that device or system are out of memory.

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


def _is_finite(row: TextOutputs) -> bool:
    return all(bool(np.isfinite(output).all()) for output in row if output is not None)
