"""The layers of a BERT-like encoder over the tokens of a batch, without padding.

States are `(S, D)` for the S tokens of B texts in a row, from the embeddings to the last layer.
Linear layers see no texts at all; only attention looks at their lengths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from langchain_bge_dense._engine.linear import ATTENTION_BY_PRODUCTS, LinearFactory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Attention = Callable[[Tensor, int], Tensor]

MODEL_TYPES = ("bert", "camembert", "roberta", "xlm-roberta")  # BERT's layers under BERT's names

# Texts up to so many tokens together attend in one call, with a mask (benchmarks/README.md).
_RUN_TOKENS = {"cpu": 64, "mps": 512, "cuda": 512}

# Texts from so many tokens on are faster by products, where these are (benchmarks/README.md).
_PRODUCT_TOKENS = 256
_PRODUCT_QUERIES = 256  # at a time
_PRODUCT_SCORES = 2**21  # about what stays in the cache


class PackedEncoder(nn.Module):
    """A transformers encoder of a type in `MODEL_TYPES`, rebuilt from its weights.

    Args:
        encoder: The encoder, in float32.
        dtype: What products are computed in: `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`.
        state_dtype: Of what goes into products; sums of states are float32 all the same.
        device: Where it runs.
        release: Let go of each weight of `encoder` once it is packed, which ends its use.
    """

    def __init__(
        self,
        encoder: Any,
        dtype: str,
        state_dtype: torch.dtype,
        device: torch.device,
        *,
        release: bool,
    ) -> None:
        super().__init__()
        linear = LinearFactory(dtype, device, state_dtype)
        self._heads = encoder.config.num_attention_heads
        self._state_dtype = state_dtype
        self.embeddings = _Embeddings(encoder.embeddings, state_dtype, device)
        if release:
            encoder.embeddings = None
        self.layers = nn.ModuleList()
        for index, layer in enumerate(encoder.encoder.layer):
            self.layers.append(_Layer(layer, linear, device))
            if release:
                encoder.encoder.layer[index] = nn.Identity()

    @staticmethod
    def supports(config: Any) -> bool:
        """Whether the layers below compute what a transformers config describes."""
        return bool(
            config.model_type in MODEL_TYPES
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
        )

    def forward(self, batch: Sequence[NDArray[np.int32]]) -> Tensor:
        """Run B texts.

        Args:
            batch: Token ids, B times `(T_i,)`.

        Returns:
            States of the last layer, `(S, D)` float32.
        """
        states: Tensor = self.embeddings(batch)  # (S, D)
        attention = attention_over([len(ids) for ids in batch], states.device, self._state_dtype)
        for layer in self.layers:
            states = layer(states, attention, self._heads)  # (S, D)
        return states


class _Embeddings(nn.Module):
    def __init__(self, embeddings: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        words, positions, types = (
            table.weight.detach()
            for table in (
                embeddings.word_embeddings,
                embeddings.position_embeddings,
                embeddings.token_type_embeddings,
            )
        )
        self._words = words.to(device, dtype, copy=True)  # (V, D)
        self._positions = (positions + types[0]).to(device)  # (P, D): there is one type
        self._norm = _norm(embeddings.LayerNorm, device)
        # RoBERTa counts from the padding's id on, and past padding that a text spells out.
        self._padding = getattr(embeddings, "padding_idx", None)

    def forward(self, batch: Sequence[NDArray[np.int32]]) -> Tensor:
        device = self._words.device
        ids, positions = (
            torch.from_numpy(np.concatenate(parts)).to(device, torch.int64)  # (S,)
            for parts in (batch, [self._positions_of(ids) for ids in batch])
        )
        return self._norm(self._words[ids].float() + self._positions[positions])  # (S, D)

    def _positions_of(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        if self._padding is None:
            return np.arange(len(ids))
        counted = ids != self._padding
        positions: NDArray[np.int64] = np.cumsum(counted) * counted + self._padding
        return positions


class _Layer(nn.Module):
    """A module, so that PyTorch's hooks run before it."""

    def __init__(self, layer: Any, linear: LinearFactory, device: torch.device) -> None:
        super().__init__()
        attention, output = layer.attention.self, layer.attention.output
        parts = (attention.query, attention.key, attention.value)
        self._qkv = linear(
            torch.cat([part.weight.detach() for part in parts]),
            torch.cat([part.bias.detach() for part in parts]),
        )
        self._output = linear(output.dense.weight, output.dense.bias)
        self._output_norm = _norm(output.LayerNorm, device)
        up, down = layer.intermediate.dense, layer.output.dense
        self._up = linear(up.weight, up.bias, gelu=True)
        self._down = linear(down.weight, down.bias)
        self._down_norm = _norm(layer.output.LayerNorm, device)

    def forward(self, states: Tensor, attention: Attention, heads: int) -> Tensor:
        mixed = attention(self._qkv(states), heads)  # (S, D)
        states = self._output_norm(states + self._output(mixed).float())  # (S, D)
        inner = self._up(states)  # (S, 4 D)
        return self._down_norm(states + self._down(inner).float())  # (S, D)


def _norm(norm: nn.LayerNorm, device: torch.device) -> Callable[[Tensor], Tensor]:
    # Copies, and not the module: one of its tensors would keep the checkpoint's file mapped.
    weight, bias = (
        part.detach().to(device, torch.float32, copy=True) for part in (norm.weight, norm.bias)
    )
    epsilon = norm.eps
    return lambda states: F.layer_norm(states, weight.shape, weight, bias, epsilon)


def attention_over(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attention:
    """Make the attention of one batch.

    Args:
        lengths: Tokens of each text, B in all.
        device: Where the states are.
        dtype: Of the states.

    Returns:
        A function of queries, keys and values `(S, 3 D)` and a number of heads, that gives
        `(S, D)`.
    """
    if device.type == "cuda" and dtype != torch.float32:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # before PyTorch 2.10
            pass
        else:
            ends = np.cumsum([0, *lengths], dtype=np.int32)
            bounds = torch.from_numpy(ends).to(device)  # (B + 1,)
            longest = max(lengths)

            def flash(qkv: Tensor, heads: int) -> Tensor:
                query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)  # (S, H, D / H)
                mixed = varlen_attn(query, key, value, bounds, bounds, longest, longest)
                return mixed.reshape(len(qkv), -1)  # type: ignore[union-attr] # (S, D)

            return flash
    runs = _runs(lengths, _RUN_TOKENS.get(device.type, _RUN_TOKENS["cuda"]))
    masks = [_block_mask(run, device, dtype) for run in runs]
    totals = [sum(run) for run in runs]
    by_products = ATTENTION_BY_PRODUCTS and device.type == "cpu" and dtype == torch.bfloat16

    def run_by_run(qkv: Tensor, heads: int) -> Tensor:
        parts = torch.split(qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3), totals, 2)
        mixed = [
            _by_products(part)
            if by_products and part.shape[2] >= _PRODUCT_TOKENS
            else _scaled_dot_product(part, mask)
            for part, mask in zip(parts, masks, strict=True)
        ]  # each (H, T, D / H)
        joined = torch.cat(mixed, 1) if len(mixed) > 1 else mixed[0]
        return joined.transpose(0, 1).reshape(len(qkv), -1)  # (S, D)

    return run_by_run


def _scaled_dot_product(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one run, `(3, H, T, D / H)` to `(H, T, D / H)`."""
    query, key, value = qkv[:1], qkv[1:2], qkv[2:]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0]


def _by_products(qkv: Tensor) -> Tensor:
    """The same for one text in bfloat16, by batched products of some heads and queries at a time.

    A score that is rounded to bfloat16 is off by up to 0.4 %, too much where it is large. So a
    first product finds each query's largest score, and a second one takes it off before rounding,
    which softmax does not notice: scores that count are then close to 0.
    """
    heads = max(2, _PRODUCT_SCORES // (_PRODUCT_QUERIES * qkv.shape[2]))
    if heads < qkv.shape[1]:
        return torch.cat([_by_products(part) for part in torch.split(qkv, heads, 1)])
    query, key, value = qkv.contiguous()  # each (H, T, D / H)
    scale = key.shape[-1] ** -0.5
    exact = 2.0 ** math.floor(math.log2(scale))  # does not round the queries
    query, rest = query * exact, scale / exact
    mean = key.mean(1, keepdim=True)  # (H, 1, D / H)
    centred, key, mean = (part.transpose(1, 2) for part in (key - mean, key, mean))
    mixed = []
    for some in torch.split(query, _PRODUCT_QUERIES, 1):  # (H, Q, D / H)
        # Of numbers around 0 the largest is not negative: its bits are the largest integer, too,
        # and that is found eight times as fast.
        largest = torch.bmm(some, centred).view(torch.int16).amax(-1, keepdim=True)  # (H, Q, 1)
        shift = largest.view(torch.bfloat16) + torch.bmm(some, mean)
        scores = torch.baddbmm(-rest * shift, some, key, alpha=rest)  # (H, Q, T)
        mixed.append(torch.bmm(scores.softmax(-1), value))
    return torch.cat(mixed, 1)


def _runs(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours in runs of at most so many tokens; a longer text is a run of its own."""
    runs: list[list[int]] = []
    total = most + 1
    for length in lengths:
        total += length
        if total > most:
            runs.append([])
            total = length
        runs[-1].append(length)
    return runs


def _block_mask(run: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A mask that keeps texts to themselves, `(T, T)`; None for one text."""
    if len(run) == 1:
        return None
    text = torch.from_numpy(np.repeat(np.arange(len(run)), run)).to(device)  # (T,)
    foreign = text[:, None] != text  # (T, T)
    return torch.zeros(foreign.shape, dtype=dtype, device=device).masked_fill_(foreign, -torch.inf)


class PaddedEncoder(nn.Module):
    """Any other transformers encoder, run by its own module over padded batches.

    Args:
        encoder: The encoder, on its device and in its dtype.
        padding: Id of the padding token, if there is one.
    """

    def __init__(self, encoder: Any, padding: int | None) -> None:
        super().__init__()
        self._encoder = encoder
        self._padding = padding or 0  # nobody attends to it

    def forward(self, batch: Sequence[NDArray[np.int32]]) -> Tensor:
        """Run B texts, each `(T_i,)`; gives `(S, D)` float32, as `PackedEncoder` does."""
        lengths = torch.tensor([len(ids) for ids in batch])  # (B,)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
        ids = torch.full(mask.shape, self._padding, dtype=torch.int64)  # (B, T)
        ids[mask] = torch.from_numpy(np.concatenate(batch)).to(torch.int64)
        mask = mask.to(self._encoder.device)
        hidden = self._encoder(
            input_ids=ids.to(mask.device), attention_mask=mask.long(), return_dict=True
        ).last_hidden_state  # (B, T, D)
        states: Tensor = hidden[mask].float()  # (S, D)
        return states
