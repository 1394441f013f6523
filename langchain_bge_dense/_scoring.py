"""Scores of one query against many passages, from the three outputs of BGE-M3.

Knows no model, no tokenizer and no store: vectors and token weights in, float32 scores out.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

RANK_CONSTANT = 60
"""`k` of reciprocal rank fusion, as in the paper that introduced it."""

_NO_SPREAD = 1e-6  # differences between scores that are rounding alone


class PackedWeights(NamedTuple):
    """Lexical weights of `N` passages, one passage after the other, `M` weights in all."""

    ids: NDArray[np.int64]
    """Token ids, `(M,)`."""
    weights: NDArray[np.float32]
    """Their weights, `(M,)`."""
    lengths: NDArray[np.int64]
    """How many of them belong to each passage, `(N,)`."""


def pack(passages: Sequence[Mapping[int, float]]) -> PackedWeights:
    """Put the lexical weights of passages into arrays.

    Args:
        passages: Token id to weight, one mapping for each passage; it may be empty.

    Returns:
        The same weights in the same order.

    Example:
        >>> pack([{7: 0.5, 9: 0.25}, {}]).lengths
        array([2, 0])
    """
    return PackedWeights(
        np.fromiter(chain.from_iterable(passages), np.int64),  # (M,)
        np.fromiter(chain.from_iterable(p.values() for p in passages), np.float32),  # (M,)
        np.fromiter(map(len, passages), np.int64, len(passages)),  # (N,)
    )


def lexical_scores(query: Mapping[int, float], passages: PackedWeights) -> NDArray[np.float32]:
    """Sum, over the tokens that query and passage share, the products of their weights.

    Args:
        query: Token id to weight.
        passages: Weights of `N` passages, from `pack`.

    Returns:
        Scores, `(N,)`; 0 where no token is shared.

    Example:
        >>> lexical_scores({7: 0.5, 8: 1.0}, pack([{7: 0.5, 9: 0.25}, {}]))
        array([0.25, 0.  ], dtype=float32)
    """
    if not query:
        return np.zeros(len(passages.lengths), np.float32)
    ids = np.array(sorted(query), np.int64)  # (Q,)
    weights = np.array([query[i] for i in ids.tolist()], np.float32)  # (Q,)
    place = np.searchsorted(ids, passages.ids).clip(max=len(ids) - 1)  # (M,)
    shared = ids[place] == passages.ids  # (M,)
    products = np.where(shared, weights[place] * passages.weights, 0)  # (M,)
    rows = np.repeat(np.arange(len(passages.lengths)), passages.lengths)  # (M,)
    return np.bincount(rows, products, len(passages.lengths)).astype(np.float32)  # (N,)


def dense_scores(query: NDArray[np.float32], passages: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take the inner products of dense vectors: their cosines, where they have unit length.

    Args:
        query: One vector, `(D,)`.
        passages: Vectors, `(N, D)`.

    Returns:
        Scores, `(N,)`.
    """
    return passages @ query  # (N,)


def maxsim_scores(
    query: NDArray[np.float32], passages: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Give each query token its most similar passage token, and average over the query.

    Every passage keeps its own length: a similarity can be negative, so the zeros of padded
    passages could win over tokens.

    Args:
        query: ColBERT vectors, `(Q, D)`, at least one.
        passages: ColBERT vectors of each passage, `(T_i, D)`, at least one.

    Returns:
        Scores, `(N,)`.
    """
    best = [(query @ passage.T).max(axis=1).mean() for passage in passages]  # N times (Q, T_i)
    return np.array(best, np.float32)  # (N,)


def weighted_mean(
    scores: Sequence[NDArray[np.float32]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """Add up the scores of several signals, as `BGEM3FlagModel.compute_score` does.

    Args:
        scores: One array for each signal, `(N,)`: dense, lexical and, where it counts, ColBERT.
        weights: One for each signal; divided by their sum.

    Returns:
        Scores, `(N,)`.
    """
    return np.average(np.stack(scores), axis=0, weights=weights).astype(np.float32)  # (N,)


def standardized(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring scores to mean 0 and standard deviation 1.

    Args:
        scores: Of one signal for one query's candidates, `(N,)`.

    Returns:
        The same shape; all 0 where the scores are all the same.

    Example:
        >>> standardized(np.array([1.0, 3.0], np.float32))
        array([-1.,  1.], dtype=float32)
    """
    spread = scores.std() if len(scores) else 0.0
    if spread < _NO_SPREAD:
        return np.zeros_like(scores)
    scaled: NDArray[np.float32] = (scores - scores.mean()) / spread  # (N,)
    return scaled


def reciprocal_rank_fusion(
    rankings: Sequence[ArrayLike], count: int, constant: int = RANK_CONSTANT
) -> NDArray[np.float32]:
    """Fuse rankings: a passage gets `1 / (constant + rank)` from each one that holds it.

    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual
    rank learning methods", SIGIR 2009.

    Args:
        rankings: For each signal the numbers of passages, 0 to `count - 1`, best first.
        count: How many passages there are, `N`.
        constant: The larger it is, the less the first places count.

    Returns:
        Scores, `(N,)`; 0 for a passage in no ranking.

    Example:
        >>> reciprocal_rank_fusion([[0, 2], [2]], 3).argsort()[::-1]
        array([2, 0, 1])
    """
    fused = np.zeros(count, np.float32)  # (N,)
    for ranking in rankings:
        places = np.asarray(ranking, np.int64)
        fused[places] += 1 / (constant + np.arange(1, len(places) + 1))
    return fused


def checked_weights(weights: object) -> tuple[float, ...]:
    """Three weights, of the dense, lexical and ColBERT score, that can be used for a mean.

    Raises:
        ValueError: They are not three numbers, one is negative or not finite, or all are zero.

    Example:
        >>> checked_weights([1, 0.5, 0])
        (1.0, 0.5, 0.0)
    """
    try:
        numbers = tuple(float(weight) for weight in weights)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(0 <= n < np.inf for n in numbers) or not any(numbers):  # noqa: PLR2004
        msg = (
            f"The weights are {weights!r}. Use three numbers of 0 or more for the dense, lexical "
            "and ColBERT score, not all 0: (0.4, 0.2, 0.4) for example."
        )
        raise ValueError(msg)
    return numbers
