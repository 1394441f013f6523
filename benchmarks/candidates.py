"""What `BGEM3Retriever` chooses from, with exact scores of all three signals, and how it orders it.

Collected once, candidates can be ordered by hundreds of settings; the retriever would compute the
ColBERT vectors of the same passages for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense._scoring import maxsim_scores, score_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from beir_format import RetrievalSet
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma import BGEM3Chroma

FETCH = 100  # candidates of each of the dense and the lexical signal
TRACE = 1e-9  # a weight that has a signal scored, and changes no order
BATCH = 256
CALLERS = 16  # that wait together share a forward pass
FUSIONS = ("standard", "raw", "rrf")
RRF_K = 60


class Setting(NamedTuple):
    """How the retriever fuses.

    Attributes:
        fusion: What brings scores to one scale.
        depth: Candidates that ColBERT scores, the best of dense and lexical.
        weights: Of the dense, lexical and ColBERT score.
    """

    fusion: str
    depth: int
    weights: tuple[float, ...]

    def __str__(self) -> str:
        depth = f", best {self.depth}" if self.weights[2] else ""
        return f"{self.fusion}, {' / '.join(f'{weight:g}' for weight in self.weights)}{depth}"


def default(field: str) -> Any:
    """What `BGEM3Retriever` takes when nobody says."""
    return BGEM3Retriever.model_fields[field].default


@dataclass(frozen=True)
class Candidates:
    """What dense and lexical search find for `Q` queries, at most `C` for each, best dense first.

    Attributes:
        ids: Passage ids, by query.
        scores: Dense, lexical and exact ColBERT score, `(3, Q, C)`; NaN where a query has fewer.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, store: BGEM3Chroma, queries: list[str]) -> Candidates:
        """The best `FETCH` passages of each signal, their ColBERT scores computed anew."""
        found = documents_of(store, queries)
        scores = np.full((3, len(found), max(map(len, found))), np.nan, np.float32)  # (3, Q, C)
        for row, passages in enumerate(found):
            scores[:2, row, : len(passages)] = [
                [document.metadata[score_key(signal)] for document in passages.values()]
                for signal in ("dense", "lexical")
            ]
        ids = [list(passages) for passages in found]
        texts = {key: d.page_content for passages in found for key, d in passages.items()}
        add_colbert(store.embeddings, queries, texts, ids, scores[2])
        return cls(ids, scores)


def documents_of(store: BGEM3Chroma, queries: list[str]) -> list[dict[str, Any]]:
    """Documents by id with dense and lexical scores, best dense first, of each query."""
    retriever = BGEM3Retriever(vectorstore=store, k=FETCH, fetch_k=FETCH, scores=True)
    by_signal = [
        retriever.batch(queries, {"max_concurrency": CALLERS}, weights=weights)
        for weights in ((1, TRACE, 0), (TRACE, 1, 0))
    ]
    return [
        {d.id: d for d in sorted(chain(*lists), key=lambda d: -d.metadata[score_key("dense")])}
        for lists in zip(*by_signal, strict=True)
    ]


def add_colbert(
    embeddings: Any,
    queries: list[str],
    texts: dict[str, str],
    ids: list[list[str]],
    scores: NDArray[np.float32],
) -> None:
    """Write MaxSim scores into `(Q, C)`; each passage is encoded once, a batch at a time."""
    encoded = embeddings.encode(queries, dense=False, colbert=True, query=True).colbert
    asked: dict[str, list[tuple[int, int]]] = {passage: [] for passage in texts}
    for row, passages in enumerate(ids):
        for column, passage in enumerate(passages):
            asked[passage].append((row, column))
    for batch in batches(list(texts), BATCH):
        vectors = embeddings.encode([texts[key] for key in batch], dense=False, colbert=True)
        for passage, tokens in zip(batch, vectors.colbert, strict=True):
            for row, column in asked[passage]:
                scores[row, column] = maxsim_scores(encoded[row], [tokens])[0]


def batches(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def fused(scores: NDArray[np.float32], setting: Setting) -> NDArray[np.float32]:
    """What `BGEM3Retriever` orders candidates by, `(Q, C)`; -inf for those that it drops.

    Args:
        scores: Of the three signals, `(3, Q, C)`.
        setting: As the retriever has it.
    """
    dense, lexical, colbert = scores
    weights, fusion = setting.weights, setting.fusion
    fetch = max(default("fetch_k"), setting.depth)
    found = descending_ranks(dense) < fetch  # (Q, C)
    if weights[1]:
        found |= descending_ranks(lexical) < fetch
    parts = [
        weight * scaled(np.where(found, signal, np.nan), fusion)
        for signal, weight in zip((dense, lexical), weights[:2], strict=True)
    ]
    total = np.where(found, sum(parts), -np.inf)  # (Q, C)
    if weights[2]:
        scored = found & (descending_ranks(total) < setting.depth)
        total += weights[2] * scaled(np.where(scored, colbert, np.nan), fusion)
        total = np.where(scored, total, -np.inf)
    return total


def scaled(scores: NDArray[np.float32], fusion: str) -> NDArray[np.float32]:
    """Scores `(Q, C)` on the scale of a fusion; NaN stays NaN."""
    if fusion == "raw":
        return scores
    if fusion == "rrf":
        return np.where(np.isnan(scores), np.nan, 1 / (RRF_K + 1 + descending_ranks(scores)))
    spread = np.maximum(np.nanstd(scores, axis=1, keepdims=True), 1e-6)  # (Q, 1)
    return (scores - np.nanmean(scores, axis=1, keepdims=True)) / spread


def descending_ranks(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank of each score in its row, from 0, `(Q, C)`; NaN comes last."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], axis=1)
    return ranks


def rankings(
    texts: RetrievalSet, found: Candidates, setting: Setting, most: int
) -> dict[str, list[str]]:
    """Passage ids by fused score, the best first, `most` of each query."""
    total = fused(found.scores, setting)
    order = np.argsort(-total, axis=1, kind="stable")[:, :most]  # (Q, most)
    chosen = [
        [passages[n] for n in row if scores[n] > -np.inf]
        for passages, row, scores in zip(found.ids, order.tolist(), total, strict=True)
    ]
    return dict(zip(texts.queries, chosen, strict=True))
