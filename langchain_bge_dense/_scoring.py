"""Scores of one query against many passages, from the three outputs of BGE-M3."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

SCORES = ("dense", "lexical", "colbert", "fused", "relevance")

Fusion = Literal["standard", "raw", "rrf"]

_NO_SPREAD = 1e-6  # differences between scores that are rounding alone
_RRF_RANK = 60  # k of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)


def score_key(name: str) -> str:
    """Name the metadata key of a score. Users have no keys with this prefix.

    >>> score_key("dense")
    'bge_m3_dense_score'
    """
    return f"bge_m3_{name}_score"


SCORE_KEYS = frozenset(map(score_key, SCORES))
"""Metadata keys that a search adds: they do not belong to the document."""


def lexical_scores(
    query: Mapping[int, float], passages: Sequence[Mapping[int, float]]
) -> NDArray[np.float32]:
    """Sum the products of the weights of the tokens that query and passage share, `(N,)`.

    >>> lexical_scores({7: 0.5, 8: 1.0}, [{7: 0.5, 9: 0.25}, {}])
    array([0.25, 0.  ], dtype=float32)
    """
    scores = [
        sum(weight * passage.get(token, 0.0) for token, weight in query.items())
        for passage in passages
    ]
    return np.array(scores, np.float32)  # (N,)


def dense_scores(query: NDArray[np.float32], passages: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take the inner products of a `(D,)` query and `(N, D)` passages, `(N,)`."""
    return product(passages, query)  # (N,)


def cosines(vectors: np.ndarray[Any, Any], query: np.ndarray[Any, Any]) -> Any:
    """Compute the cosines of `(N, D)` vectors and a `(D,)` one, `(N,)`. A zero vector has 0.

    >>> cosines(np.array([[3.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), np.array([2.0, 0.0]))
    array([1. , 0.6, 0. ])
    """
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)  # (N,)
    return vectors @ query / np.maximum(norms, np.float32(1e-12))  # (N,)


def product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """`a @ b`, where there is a model in this process by the threads that run it.

    NumPy's own threads spin on after a product, on the cores that the next query needs.
    """
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "from_numpy"):
        return a @ b
    left, right = (torch.from_numpy(np.require(part, np.float32, "W")) for part in (a, b))
    result: NDArray[np.float32] = (left @ right).numpy()
    return result


def maxsim_scores(
    query: NDArray[np.float32], passages: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Give each query token its most similar passage token, and average over the query, `(N,)`.

    Every passage of `(T_i, D)` keeps its own length: a similarity can be negative, so the zeros of
    padded passages could win over tokens.
    """
    best = [
        product(query, passage.T).max(axis=1).mean() for passage in passages
    ]  # N times (Q, T_i)
    return np.array(best, np.float32)  # (N,)


def weighted_mean(
    scores: Sequence[NDArray[np.float32]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """Average `(N,)` scores of several signals, as `BGEM3FlagModel.compute_score` does."""
    return np.average(np.stack(scores), axis=0, weights=weights).astype(np.float32)  # (N,)


def standardized(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring `(N,)` scores of one query's candidates to mean 0 and standard deviation 1.

    >>> standardized(np.array([1.0, 3.0], np.float32))
    array([-1.,  1.], dtype=float32)
    """
    spread = scores.std() if len(scores) else 0.0
    if spread < _NO_SPREAD:
        return np.zeros_like(scores)
    scaled: NDArray[np.float32] = (scores - scores.mean()) / spread  # (N,)
    return scaled


def scaled(scores: NDArray[np.float32], fusion: Fusion) -> NDArray[np.float32]:
    """Bring `(N,)` scores of a signal to a scale on which they are added to those of the others.

    >>> scaled(np.array([0.1, 0.9], np.float32), "rrf") * 62
    array([1.       , 1.0163934], dtype=float32)
    """
    if fusion == "standard":
        return standardized(scores)
    if fusion == "raw":
        return scores
    ranks = np.empty(len(scores), np.float32)  # (N,)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    reciprocals: NDArray[np.float32] = np.float32(1) / (_RRF_RANK + ranks)
    return reciprocals


def checked_weights(weights: object) -> tuple[float, ...]:
    """Check three weights, of the dense, lexical and ColBERT score, not all of which are 0.

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


Weights = Annotated[tuple[float, float, float], BeforeValidator(checked_weights)]
