"""Candidates of one query from a collection, scored by the signals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import Document

from langchain_bge_dense._scoring import Fusion, cosines, maxsim_scores, scaled, score_key
from langchain_bge_dense.chroma.settings import underlying
from langchain_bge_dense.chroma.signals import key_of
from langchain_bge_dense.chroma.store import BGEM3Chroma
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.chroma.passages import Passages

_MOST_IDS = 100_000  # of one request, which a server takes up to 40 MiB of
_WITH_CODES, _COMPUTED = 50, 20  # candidates that are scored by ColBERT


@dataclass(frozen=True)
class Search:
    """A query and the options of its search.

    Attributes:
        query: The query.
        k: How many documents.
        count: How many candidates of each signal.
        weights: Of the dense, lexical and ColBERT score.
        fusion: How the scores are added up.
        colbert: Score candidates by ColBERT; by default where the store keeps codes.
        colbert_k: How many; None for what suits the store.
        filters: Chroma's `where` and `where_document`, if there are any.
    """

    query: str
    k: int
    count: int
    weights: tuple[float, ...]
    fusion: Fusion
    colbert: bool | None = None
    colbert_k: int | None = None
    filters: Mapping[str, Any] = field(default_factory=dict)


def model_of(store: object, embeddings: BGEM3Embeddings | None = None) -> BGEM3Embeddings:
    """Find the model to search a store with: that of the caller, if any, or the store's own."""
    if not isinstance(store, BGEM3Chroma):
        msg = f"vectorstore is {type(store).__name__}. Use a store of open_chroma."
        raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
    model: object = underlying(embeddings or store.embeddings)  # type: ignore[arg-type]
    if not isinstance(model, BGEM3Embeddings):
        msg = (
            f"The store's embeddings are {type(model).__name__}, not BGEM3Embeddings. Open the "
            "store with BGEM3Embeddings, or pass the ones that filled it as `embeddings`."
        )
        raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
    if embeddings is not None:
        store.passages.check_model(model.fingerprint)
    return model


@dataclass
class Candidates:
    """`N` passages; every list and array has one entry each.

    Attributes:
        ids: Their ids in the collection.
        texts: What is stored there.
        metadatas: What is stored there.
        fused: What they are ordered by, `(N,)`.
        scores: Scores by signal, `(N,)` each.
        scored: How many were scored by ColBERT.
        uncoded: How many of these had no codes where the collection keeps them.
        unweighted: How many of all passages have no lexical weights, and of how many.
    """

    ids: list[str]
    texts: list[str]
    metadatas: list[Mapping[str, Any]]
    fused: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scored: int = 0
    uncoded: int = 0
    unweighted: tuple[int, int] = (0, 0)

    @property
    def keys(self) -> list[str]:
        """Keys of their signals."""
        return list(map(key_of, self.ids, self.texts))

    def add(self, passages: Passages, ids: Sequence[str], vector: NDArray[np.float32]) -> None:
        """Add passages by their ids, those that are still stored."""
        known = set(self.ids)
        new = [passage for passage in ids if passage not in known]
        if not new:
            return
        found = passages.collection.get(new, include=["documents", "metadatas", "embeddings"])
        if not found["ids"]:
            return
        self.ids += found["ids"]
        self.texts += [text or "" for text in found["documents"]]
        self.metadatas += [metadata or {} for metadata in found["metadatas"]]
        dense = cosines(np.asarray(found["embeddings"], np.float32), vector)
        self.scores["dense"] = np.concatenate([self.scores["dense"], dense])  # (N,)
        self.fused = np.zeros(len(self.ids), np.float32)  # (N,)

    def fuse(self, signal: str, weight: float, fusion: Fusion) -> None:
        """Add the scores of a signal to what the candidates are ordered by."""
        self.fused = self.fused + np.float32(weight) * scaled(self.scores[signal], fusion)

    def best(self, count: int) -> Candidates:
        """Select those with the highest fused scores, the best first."""
        order = np.argsort(-self.fused, kind="stable")[:count]  # (count,)
        numbers = order.tolist()
        return replace(
            self,
            ids=[self.ids[n] for n in numbers],
            texts=[self.texts[n] for n in numbers],
            metadatas=[self.metadatas[n] for n in numbers],
            fused=self.fused[order],
            scores={signal: values[order] for signal, values in self.scores.items()},
        )

    def documents(self, *, scores: bool) -> list[Document]:
        """Make documents, with their scores in the metadata or without."""
        named = {"fused": self.fused, **self.scores} if scores else {}
        added = [
            {score_key(name): float(v[n]) for name, v in named.items()}
            for n in range(len(self.ids))
        ]
        rows = zip(self.ids, self.texts, self.metadatas, added, strict=True)
        return [
            Document(text, id=passage, metadata={**metadata, **more})
            for passage, text, metadata, more in rows
        ]


def find(passages: Passages, model: BGEM3Embeddings, search: Search) -> Candidates:
    """Find the best passages of a collection."""
    settings = passages.refresh()
    unweighted = passages.count_without_weights() if search.weights[1] else (0, 0)
    lexical = bool(search.weights[1]) and len(passages.index) > 0
    asked = bool(settings.colbert) if search.colbert is None else search.colbert
    colbert = asked and search.weights[2] > 0
    encoded = model.encode([search.query], lexical=lexical, colbert=colbert, query=True)
    candidates = by_dense_and_lexical(passages, encoded, search)
    candidates.unweighted = unweighted
    if colbert and candidates.ids:
        count = search.colbert_k or (_WITH_CODES if settings.colbert else _COMPUTED)
        candidates = candidates.best(max(search.k, count))
        _add_colbert(passages, model, encoded, candidates)
        candidates.fuse("colbert", search.weights[2], search.fusion)
    return candidates.best(search.k)


def by_dense_and_lexical(passages: Passages, query: M3Encoding, search: Search) -> Candidates:
    """Find candidates of the dense and, where the query has it, the lexical signal."""
    vector: Any = query.dense[0]  # type: ignore[index]
    # Chroma takes most of a query's time to find what passes the filters: it is asked once.
    among = passages.ids(**search.filters) if query.lexical and search.filters else None
    candidates = nearest(passages, vector, search, among)
    if query.lexical:
        scores = passages.index.scores(query.lexical[0])
        candidates.add(passages, scores.ranked(search.count, among), vector)
        candidates.scores["lexical"] = np.nan_to_num(scores.of(candidates.keys))
    for signal, weight in zip(("dense", "lexical"), search.weights[:2], strict=True):
        if signal in candidates.scores:
            candidates.fuse(signal, weight, search.fusion)
    return candidates


def nearest(
    passages: Passages,
    vector: NDArray[np.float32],
    search: Search,
    among: list[str] | None = None,
) -> Candidates:
    """Find the passages with the nearest dense vectors, among those that pass the filters."""
    if among is not None and len(among) > _MOST_IDS:
        among = None
    found = passages.collection.query([vector], search.count, among=among, **search.filters)
    ids, texts, metadatas, distances = (
        found[name][0] for name in ("ids", "documents", "metadatas", "distances")
    )
    fused = np.zeros(len(ids), np.float32)  # (N,)
    made = Candidates(ids, texts, [each or {} for each in metadatas], fused)
    made.scores["dense"] = 1 - np.array(distances, np.float32)  # (N,)
    return made


def _add_colbert(
    passages: Passages, model: BGEM3Embeddings, query: M3Encoding, candidates: Candidates
) -> None:
    """Score candidates by MaxSim: from their codes, else from vectors computed now."""
    alone = type(query)(None, None, query.colbert, query.token_counts, query.truncated)
    scores = passages.scores(alone, candidates.keys)["colbert"]  # (N,)
    lacking = np.flatnonzero(np.isnan(scores))
    if len(lacking):
        texts = [candidates.texts[row] for row in lacking]
        encoding = model.encode(texts, dense=False, colbert=True)
        scores[lacking] = maxsim_scores(query.colbert[0], encoding.colbert or [])  # type: ignore[index]
    candidates.scored = len(scores)
    candidates.uncoded = len(lacking) if passages.settings.colbert else 0
    candidates.scores["colbert"] = scores
