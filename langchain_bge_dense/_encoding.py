"""`M3Encoding`, and how it is put together from what the scheduler gives.

NumPy only: knows no LangChain, no torch and no threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense._encoder import Signals
    from langchain_bge_dense._jobs import Encoded


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
        >>> encoding.dense.shape
        (1, 2)
    """

    dense: NDArray[np.float32] | None
    lexical: list[dict[int, float]] | None
    colbert: list[NDArray[np.float32]] | None
    token_counts: NDArray[np.int64]
    truncated: NDArray[np.bool_]


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale vectors to unit length, as `torch.nn.functional.normalize` does.

    Args:
        vectors: `(..., D)`, float32.

    Returns:
        The same shape; a zero vector stays zero.
    """
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


def dense_vectors(encoded: Encoded, *, normalize: bool) -> NDArray[np.float32]:
    """Dense vectors of one job, `(N, D)`."""
    dense = encoded.vectors.dense
    if dense is None:
        msg = "This job computed no dense vectors. Ask for them in its signals."
        raise ValueError(msg)
    return normalized(dense) if normalize else dense


def assemble(  # noqa: PLR0913
    parts: Sequence[Encoded],
    signals: Signals,
    *,
    dimension: int,
    max_length: int,
    unweighted: NDArray[np.int32],
    normalize: bool,
) -> M3Encoding:
    """Join the windows of one call.

    Args:
        parts: What the windows' jobs gave.
        signals: What they computed.
        dimension: Width D of a dense vector, for a call without texts.
        max_length: Tokens that texts were cut to.
        unweighted: Ids of the special tokens that carry no lexical weight.
        normalize: Scale vectors to unit length.
    """
    counts = np.array([tokens.total for part in parts for tokens in part.tokens], dtype=np.int64)
    dense = lexical = colbert = None
    if signals.dense:
        rows = [dense_vectors(part, normalize=normalize) for part in parts]
        dense = np.concatenate([np.empty((0, dimension), np.float32), *rows])  # (N, D)
    if signals.lexical:
        lexical = [
            lexical_weights(tokens.ids, weights, unweighted)
            for part in parts
            for tokens, weights in zip(part.tokens, part.vectors.weights or [], strict=True)
        ]
    if signals.colbert:
        vectors = [vectors for part in parts for vectors in part.vectors.colbert or []]
        colbert = [normalized(v) for v in vectors] if normalize else vectors
    return M3Encoding(dense, lexical, colbert, counts, counts > max_length)
