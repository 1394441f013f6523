"""The layers of a BERT-like encoder over the tokens of a batch, without padding.

States are `(S, D)` for the S tokens of B texts in a row, from the embeddings to the last layer.
Linear layers see no texts at all; only attention looks at their lengths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn

from langchain_bge_dense._engine.linear import ATTENTION_BY_PRODUCTS, LinearFactory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from langchain_bge_dense._engine.linear import Linear

    Attention = Callable[[Tensor, int], Tensor]
    Weights = Callable[[str], dict[str, Tensor]]  # of a part, by transformers' names
    Part = dict[str, Any]  # tensors, and what `LinearFactory.convert` gives
    Parts = Callable[[str], Part]  # by our names, in the form that layers are made of

MODEL_TYPES = ("bert", "camembert", "roberta", "xlm-roberta")  # BERT's layers under BERT's names

# Texts up to so many tokens together attend in one call, with a mask (benchmarks/README.md).
_RUN_TOKENS = {"cpu": 64, "mps": 512, "cuda": 512}

# Texts from so many tokens on are faster by products, where these are (benchmarks/README.md).
_PRODUCT_TOKENS = 256
_PRODUCT_QUERIES = 256  # at a time
_PRODUCT_SCORES = 2**21  # about what stays in the cache


class Shape(NamedTuple):
    """Numbers of an encoder that no tensor tells."""

    layers: int
    heads: int
    epsilon: float
    padding: int | None
    """RoBERTa counts positions from its id on, and past padding that a text spells out."""

    @classmethod
    def of(cls, encoder: Any) -> Shape:
        """Read the shape of a transformers encoder."""
        config = encoder.config
        return cls(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.layer_norm_eps,
            getattr(encoder.embeddings, "padding_idx", None),
        )

    def parts(self) -> list[str]:
        """Names of the parts that an encoder is made of, one after the other."""
        return ["embeddings", *(f"encoder.layer.{index}" for index in range(self.layers))]


class PackedEncoder(nn.Module):
    """A transformers encoder of a type in `MODEL_TYPES`, rebuilt from its weights.

    Args:
        shape: Its numbers.
        parts: Gives the weights of a part as `converted` does. What it gives of the embeddings is
            kept, and all else copied.
        linear: Makes its linear layers, of which it has device and dtypes.
    """

    def __init__(self, shape: Shape, parts: Parts, linear: LinearFactory) -> None:
        super().__init__()
        self._heads = shape.heads
        self._state_dtype = linear.state_dtype
        embeddings, *layers = shape.parts()
        self.embeddings = _Embeddings(parts(embeddings), shape)
        self.layers = nn.ModuleList(_Layer(parts(name), shape.epsilon, linear) for name in layers)

    @staticmethod
    def supports(config: Any) -> bool:
        """Tell whether the layers below compute what a transformers config describes."""
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


def module_weights(encoder: nn.Module) -> Weights:
    """Read the parameters of a transformers encoder, part by part."""
    return lambda part: {
        name: weight.detach() for name, weight in encoder.get_submodule(part).named_parameters()
    }


def converted(weights: Weights, linear: LinearFactory) -> Parts:
    """Convert the parts of a transformers encoder to the form of layers, and of a packed file."""

    def part(name: str) -> Part:
        found = weights(name)
        if name == "embeddings":
            return _convert_embeddings(found, linear)
        return _convert_layer(found, linear)

    return part


def _convert_embeddings(weights: dict[str, Tensor], linear: LinearFactory) -> Part:
    words, positions, types = (
        weights[f"{table}_embeddings.weight"] for table in ("word", "position", "token_type")
    )
    return {
        "words": words.to(linear.device, linear.state_dtype, copy=True),  # (V, D)
        "positions": (positions + types[0]).to(linear.device),  # (P, D): there is one type
        **_convert_norm("norm", weights, "LayerNorm", linear.device),
    }


def _convert_layer(weights: dict[str, Tensor], linear: LinearFactory) -> Part:
    qkv = [f"attention.self.{part}" for part in ("query", "key", "value")]
    names = {"output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    part: Part = {
        "qkv.weight": linear.convert(torch.cat([weights[f"{name}.weight"] for name in qkv])),
        "qkv.bias": torch.cat([weights[f"{name}.bias"] for name in qkv]),
    }
    for own, name in names.items():
        part[f"{own}.weight"] = linear.convert(weights[f"{name}.weight"])
        part[f"{own}.bias"] = weights[f"{name}.bias"]
    return {
        **part,
        **_convert_norm("output_norm", weights, "attention.output.LayerNorm", linear.device),
        **_convert_norm("down_norm", weights, "output.LayerNorm", linear.device),
    }


def _convert_norm(own: str, weights: dict[str, Tensor], name: str, device: torch.device) -> Part:
    return {
        f"{own}.{part}": weights[f"{name}.{part}"].to(device, torch.float32)
        for part in ("weight", "bias")
    }


class _Embeddings(nn.Module):
    def __init__(self, part: Part, shape: Shape) -> None:
        super().__init__()
        self._words = part["words"]  # (V, D)
        self._positions = part["positions"]  # (P, D)
        self._norm = _norm(part, "norm", shape.epsilon)
        self._padding = shape.padding

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

    def __init__(self, part: Part, epsilon: float, linear: LinearFactory) -> None:
        super().__init__()

        def layer(name: str, *, gelu: bool = False) -> Linear:
            return linear(part[f"{name}.weight"], part[f"{name}.bias"], gelu=gelu)

        self._qkv, self._output = layer("qkv"), layer("output")
        self._output_norm = _norm(part, "output_norm", epsilon)
        self._up, self._down = layer("up", gelu=True), layer("down")
        self._down_norm = _norm(part, "down_norm", epsilon)

    def forward(self, states: Tensor, attention: Attention, heads: int) -> Tensor:
        mixed = attention(self._qkv(states), heads)  # (S, D)
        states = self._output_norm(states + self._output(mixed).float())  # (S, D)
        inner = self._up(states)  # (S, 4 D)
        return self._down_norm(states + self._down(inner).float())  # (S, D)


def _norm(part: Part, name: str, epsilon: float) -> Callable[[Tensor], Tensor]:
    # Copies: a view of the checkpoint's file would keep it mapped.
    weight, bias = (part[f"{name}.{each}"].clone() for each in ("weight", "bias"))
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
    """Compute the attention of one run, `(3, H, T, D / H)` to `(H, T, D / H)`."""
    query, key, value = qkv[:1], qkv[1:2], qkv[2:]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0]


def _by_products(qkv: Tensor) -> Tensor:
    """Compute the attention of one text in bfloat16, by products of some heads and queries at once.

    A score that is rounded to bfloat16 is off by up to 0.4 %, too much where it is large. So a
    first product finds about the largest score of each query, and a second one takes it off before
    rounding, which softmax does not notice: scores that count are then close to 0. The first
    product takes the eighth of the keys with the largest norm, which have the largest scores or
    nearly so. A score that it misses costs digits, and no more.
    """
    heads = max(2, _PRODUCT_SCORES // (_PRODUCT_QUERIES * qkv.shape[2]))
    if heads < qkv.shape[1]:
        return torch.cat([_by_products(part) for part in torch.split(qkv, heads, 1)])
    query, key, value = qkv.contiguous()  # each (H, T, D / H)
    scale = key.shape[-1] ** -0.5
    exact = 2.0 ** math.floor(math.log2(scale))  # does not round the queries
    query, rest = query * exact, scale / exact
    mean = key.mean(1, keepdim=True)  # (H, 1, D / H)
    largest, key, mean = (
        part.transpose(1, 2) for part in (_of_largest_norm(key - mean), key, mean)
    )
    mixed = []
    for some in torch.split(query, _PRODUCT_QUERIES, 1):  # (H, Q, D / H)
        # Of numbers around 0 the largest is hardly negative: its bits are the largest integer, too,
        # and that is found eight times as fast.
        peak = torch.bmm(some, largest).view(torch.int16).amax(-1, keepdim=True)  # (H, Q, 1)
        shift = peak.view(torch.bfloat16) + torch.bmm(some, mean)
        scores = torch.baddbmm(-rest * shift, some, key, alpha=rest)  # (H, Q, T)
        mixed.append(torch.bmm(scores.softmax(-1), value))
    return torch.cat(mixed, 1)


def _of_largest_norm(keys: Tensor) -> Tensor:
    """Select the eighth of the keys that have the largest norm, `(H, T, D / H)`, or 256."""
    norms = keys.float().square().sum(-1)  # (H, T)
    most = norms.topk(max(_PRODUCT_TOKENS, keys.shape[1] // 8), sorted=False).indices
    return keys.gather(1, most[..., None].expand(-1, -1, keys.shape[-1]))


def _runs(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group neighbours into runs of at most so many tokens. A longer text is its own run."""
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
    """Make a mask that separates the texts of a run, `(T, T)`. One text needs none."""
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
        """Run B texts, each `(T_i,)`, to `(S, D)` float32, as `PackedEncoder` does."""
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
