"""What travels: outputs asked for, tokens, the outputs of a text, `M3Encoding` and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized

    from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.safetensors"
"""Type of the bytes of an encoding."""


@dataclass(frozen=True)
class Outputs:
    """Which outputs of a forward pass are asked for."""

    dense: bool = True
    lexical: bool = False
    colbert: bool = False

    def __or__(self, other: Outputs) -> Outputs:
        return Outputs(
            self.dense or other.dense,
            self.lexical or other.lexical,
            self.colbert or other.colbert,
        )


class Tokens(NamedTuple):
    """A tokenised text."""

    ids: NDArray[np.int32]  # (T,), special tokens included, cut to the maximum length
    total: int  # before the cut


class TextOutputs(NamedTuple):
    """Outputs of one text, float32, not normalised; None where an output is not asked for."""

    dense: NDArray[np.float32] | None  # (D,)
    lexical: NDArray[np.float32] | None  # (T,), a weight a token
    colbert: NDArray[np.float32] | None  # (T - 1, D)

    def select(self, outputs: Outputs) -> TextOutputs:
        """Select the outputs that are asked for."""
        return TextOutputs(
            self.dense if outputs.dense else None,
            self.lexical if outputs.lexical else None,
            self.colbert if outputs.colbert else None,
        )


@dataclass(frozen=True, eq=False)
class M3Encoding:
    """BGE-M3's outputs for N texts, in their order.

    Attributes:
        dense: `(N, D)` float32, or None where it was not asked for.
        lexical: N dicts of token id to weight, or None.
        colbert: N arrays `(T_i, D)` float32, one vector a token without the first, or None.
        token_counts: `(N,)` int64, special tokens included, before any cut.
        truncated: `(N,)` bool, whether a text was longer than `max_length`.

    Example:
        >>> import numpy as np
        >>> encoding = M3Encoding(
        ...     np.ones((1, 2)), None, None, token_counts=np.array([4]), truncated=np.array([False])
        ... )
        >>> encoding
        M3Encoding(1 text, 4 tokens, 0 truncated: dense (1, 2))
    """

    dense: NDArray[np.float32] | None
    lexical: list[dict[int, float]] | None
    colbert: list[NDArray[np.float32]] | None
    token_counts: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    def __repr__(self) -> str:
        count = len(self.token_counts)
        outputs = []
        if self.dense is not None:
            outputs.append(f"dense {self.dense.shape}")
        if self.lexical is not None:
            outputs.append(f"lexical {sum(map(len, self.lexical)):,} weights")
        if self.colbert is not None:
            outputs.append(f"colbert {sum(map(len, self.colbert)):,} vectors")
        return (
            f"M3Encoding({count:,} text{'s' * (count != 1)}, {self.token_counts.sum():,} tokens, "
            f"{self.truncated.sum():,} truncated: {', '.join(outputs)})"
        )


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale `(..., D)` vectors to unit length as `torch.nn.functional.normalize` does."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(norms, np.float32(1e-12))
    return unit


def lexical_weights(
    ids: NDArray[np.int32], weights: NDArray[np.float32], unweighted: NDArray[np.int32]
) -> dict[int, float]:
    """Largest positive weight of each token id.

    Args:
        ids: `(T,)`.
        weights: `(T,)`.
        unweighted: Ids of the special tokens that carry no weight.

    >>> ids, weights = np.array([0, 5, 7, 5]), np.array([0.9, 0.25, 0.0, 0.5])
    >>> lexical_weights(ids, weights, np.array([0]))
    {5: 0.5}
    """
    keep = (weights > 0) & ~np.isin(ids, unweighted)
    ids, weights = ids[keep], weights[keep]
    order = np.argsort(weights, kind="stable")  # the largest of equal ids comes last and stays
    return dict(zip(ids[order].tolist(), weights[order].tolist(), strict=True))


def encoding_of(  # noqa: PLR0913
    tokens: Sequence[Tokens],
    rows: Sequence[TextOutputs],
    outputs: Outputs,
    *,
    dimension: int,
    max_length: int,
    unweighted: NDArray[np.int32],
    normalize: bool,
) -> M3Encoding:
    """Join the outputs of N texts. `dimension` is the width of no texts."""
    counts = np.array([text.total for text in tokens], dtype=np.int64)  # (N,)
    scaled = normalized if normalize else np.asarray
    dense = lexical = colbert = None
    if outputs.dense:
        vectors = [row.dense for row in rows if row.dense is not None]
        dense = scaled(np.array(vectors, np.float32).reshape(-1, dimension))  # (N, D)
    if outputs.lexical:
        lexical = [
            lexical_weights(text.ids, row.lexical, unweighted)
            for text, row in zip(tokens, rows, strict=True)
            if row.lexical is not None
        ]
    if outputs.colbert:
        colbert = [scaled(row.colbert) for row in rows if row.colbert is not None]
    return M3Encoding(dense, lexical, colbert, counts, counts > max_length)


def to_bytes(encoding: M3Encoding) -> bytes:
    """Pack an encoding of N texts into bytes, output after output.

    Returns:
        A safetensors file of `token_counts` `(N,)`, `truncated` `(N,)`, and, as asked for, `dense`
        `(N, D)`, `lexical_sizes` `(N,)`, `lexical_ids` `(S,)`, `lexical_weights` `(S,)`,
        `colbert_sizes` `(N,)` and `colbert` `(S, D)`.
    """
    tensors: dict[str, NDArray[Any]] = {
        "token_counts": encoding.token_counts,
        "truncated": encoding.truncated,
    }
    if encoding.dense is not None:
        tensors["dense"] = encoding.dense
    if (rows := encoding.lexical) is not None:
        tensors["lexical_sizes"] = _sizes(rows)
        tensors["lexical_ids"] = np.array([id_ for row in rows for id_ in row], np.int32)
        weights = [weight for row in rows for weight in row.values()]
        tensors["lexical_weights"] = np.array(weights, np.float32)
    if encoding.colbert is not None:
        tensors["colbert_sizes"] = _sizes(encoding.colbert)
        if encoding.colbert:
            tensors["colbert"] = np.concatenate(encoding.colbert)
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def from_bytes(replies: Sequence[bytes]) -> M3Encoding:
    """Join the replies of one call, at least one, each with the next texts."""
    parts = [load(reply) for reply in replies]

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([part[name] for part in parts if name in part])

    dense = lexical = colbert = None
    if "dense" in parts[0]:
        dense = joined("dense")  # (N, D)
    if "lexical_sizes" in parts[0]:
        ids, weights = joined("lexical_ids").tolist(), joined("lexical_weights").tolist()
        lexical = [
            dict(zip(ids[start:stop], weights[start:stop], strict=True))
            for start, stop in pairwise(_bounds(joined("lexical_sizes")))
        ]
    if "colbert_sizes" in parts[0]:
        vectors = joined("colbert")  # (S, D)
        colbert = [
            vectors[start:stop] for start, stop in pairwise(_bounds(joined("colbert_sizes")))
        ]
    return M3Encoding(dense, lexical, colbert, joined("token_counts"), joined("truncated"))


def _sizes(rows: Sequence[Sized]) -> NDArray[np.int64]:
    return np.array([len(row) for row in rows], np.int64)


def _bounds(sizes: NDArray[np.int64]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]
