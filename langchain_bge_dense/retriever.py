"""`BGEM3Retriever`: hybrid search over a Chroma, by all three signals of BGE-M3."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_bge_dense._scoring import (
    checked_weights,
    maxsim_scores,
    score_key,
    standardized,
)
from langchain_bge_dense.embeddings import BGEM3Embeddings
from langchain_bge_dense.rerank import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb import Collection
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
    )
    from langchain_core.retrievers import LangSmithRetrieverParams
    from numpy.typing import NDArray
    from typing_extensions import Self

    from langchain_bge_dense._engine.outputs import M3Encoding
    from langchain_bge_dense.chroma.lexical import LexicalScores, LexicalWeights
    from langchain_bge_dense.chroma.passages import Passages

_COLBERT_CANDIDATES = 20
_FILTERED_DEPTH = 10  # times as many lexical candidates are looked up before a filter drops some


class BGEM3Retriever(BaseRetriever):
    """Dense and lexical candidates from a store of `open_chroma`, scored by several signals.

    Each signal's scores are brought to one scale by their mean and standard deviation over the
    query's candidates before they are weighted: a lexical score is a sum over shared tokens and
    has no fixed range, so that raw sums would let long queries count more on one side. Documents
    are ordered by the weighted sum, the fused score: 0 is an average candidate of this query, and
    fused scores of two queries cannot be compared.

    All of `k`, `fetch_k`, `weights`, `filter` and `where_document` can also be passed to `invoke`,
    `ainvoke`, `batch` and `abatch`; `{}` takes a filter away.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
        >>> from langchain_bge_dense.chroma import index_documents, open_chroma
        >>> from langchain_core.documents import Document
        >>> store = open_chroma(BGEM3Embeddings(model=checkpoint), "rights", lexical=True)
        >>> _ = index_documents(store, [Document("equal rights"), Document("a brown fox")])
        >>> BGEM3Retriever(vectorstore=store).invoke("equal rights", k=1)[0].page_content
        'equal rights'
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    vectorstore: Any
    """A store of `open_chroma(..., lexical=True)`."""
    embeddings: BGEM3Embeddings | None = None
    """The model; None: the store's own."""
    k: int = Field(4, ge=1)
    """How many documents to return."""
    fetch_k: int = Field(50, ge=1)
    """Candidates of each of the dense and the lexical signal; `k` where that is more."""
    weights: Weights = (0.4, 0.2, 0.4)
    """Of the dense, lexical and ColBERT score."""
    colbert: bool = False
    """Score the best 20 candidates, or `k`, by their ColBERT vectors too, at query time."""
    filter: dict[str, Any] | None = None
    """Chroma's metadata filter."""
    where_document: dict[str, Any] | None = None
    """Chroma's filter of texts: `{"$contains": "trout"}` for example."""
    scores: bool = False
    """Add `bge_m3_fused_score` and `bge_m3_dense_score`, `bge_m3_lexical_score` and
    `bge_m3_colbert_score`, as the model gives them, to the metadata. Without them a passage is the
    same document for every query, which `MultiQueryRetriever` and others rely on."""

    _warned: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        from langchain_bge_dense.chroma import BGEM3Chroma
        from langchain_bge_dense.chroma.collection import check

        if not isinstance(self.vectorstore, BGEM3Chroma):
            msg = f"vectorstore is {type(self.vectorstore).__name__}. Use a store of open_chroma."
            raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
        check(self._passages.collection, self._model.fingerprint)
        self._check_weights(self.weights)
        return self

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if not self.colbert and not any(weights[:2]):
            msg = (
                f"The weights are {weights} and colbert is False, so that nothing counts. "
                "Set colbert=True, or a dense or lexical weight above 0."
            )
            raise ValueError(msg)

    @property
    def _passages(self) -> Passages:
        return self.vectorstore._passages  # type: ignore[no-any-return]  # noqa: SLF001

    @property
    def _model(self) -> BGEM3Embeddings:
        from langchain_bge_dense.chroma.collection import underlying

        model = underlying(self.embeddings or self.vectorstore.embeddings)
        if not isinstance(model, BGEM3Embeddings):
            msg = (
                f"The store's embeddings are {type(model).__name__}, not BGEM3Embeddings. Open the "
                "store with BGEM3Embeddings, or pass the ones that filled it as `embeddings`."
            )
            raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
        return model

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        """What traces say of model and store."""
        params = super()._get_ls_params(**kwargs)
        params["ls_vector_store_provider"] = type(self.vectorstore).__name__
        params["ls_embedding_provider"] = type(self._model).__name__
        params["ls_embedding_model"] = self._model.model
        return params

    def _get_relevant_documents(  # noqa: PLR0913 - what `invoke` takes
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's signature
        k: int | None = None,
        fetch_k: int | None = None,
        weights: Sequence[float] | None = None,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangChain's word
        where_document: dict[str, Any] | None = None,
    ) -> list[Document]:
        k = _at_least_one("k", self.k if k is None else k)
        fetch_k = _at_least_one("fetch_k", self.fetch_k if fetch_k is None else fetch_k)
        search = Search(
            query,
            k=k,
            count=max(k, fetch_k),
            weights=self.weights if weights is None else checked_weights(weights),
            where=(self.filter if filter is None else filter) or None,
            where_document=(self.where_document if where_document is None else where_document)
            or None,
        )
        self._check_weights(search.weights)
        best = self._passages.connection.read(lambda: self._best(search))
        return best.documents(scores=self.scores)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        call = partial(self._get_relevant_documents, run_manager=run_manager.get_sync(), **options)
        return await run_in_executor(None, call, query)

    def _best(self, search: Search) -> Candidates:
        weights = self._lexical_weights() if search.weights[1] else None
        colbert = self.colbert and search.weights[2] > 0
        encoded = self._model.encode(
            [search.query],
            lexical=weights is not None,
            colbert=colbert,
            instruction=self._model.query_instruction,
        )
        candidates = self._candidates(search, encoded, weights)
        if colbert:
            candidates = candidates.best(max(search.k, _COLBERT_CANDIDATES))
            self._add_colbert(search, encoded, candidates)
        return candidates.best(search.k)

    def _lexical_weights(self) -> LexicalWeights | None:
        """The store's weights, read to their end; None: it has none."""
        passages = self._passages
        version, count = passages.connection.version(), passages.collection.count()
        passages.weights.sync()
        lacking = count - len(passages.weights)
        unchanged = version == passages.connection.version()  # else it was counted too early
        if lacking > 0 and unchanged and not self._warned:
            self._warned = True
            msg = (
                f"{lacking:,} of {count:,} passages of the collection {passages.collection.name!r} "
                "have no lexical weights and score 0 lexically. Complete them with "
                "store.add_missing_weights(), or set the lexical weight to 0."
            )
            warn_caller(msg)
        return passages.weights if len(passages.weights) else None

    def _candidates(
        self, search: Search, encoded: M3Encoding, weights: LexicalWeights | None
    ) -> Candidates:
        """Dense and lexical candidates with the scores of both signals."""
        vector = encoded.dense[0]  # type: ignore[index]
        collection = self._passages.collection
        candidates = Candidates.nearest(collection, vector, search)
        if weights is not None:
            scores = weights.scores(encoded.lexical[0])  # type: ignore[index]
            candidates.add(collection, lexical_best(collection, scores, search), vector)
            candidates.scores["lexical"] = scores.of(candidates.ids, candidates.texts)
        for signal, weight in zip(("dense", "lexical"), search.weights[:2], strict=True):
            if signal in candidates.scores:
                candidates.fused += weight * standardized(candidates.scores[signal])
        return candidates

    def _add_colbert(self, search: Search, encoded: M3Encoding, candidates: Candidates) -> None:
        """Score candidates by MaxSim too, and add it to their fused score."""
        if not candidates.ids:
            return
        passages = self._model.encode(candidates.texts, dense=False, colbert=True).colbert
        scores = maxsim_scores(encoded.colbert[0], passages or [])  # type: ignore[index]
        candidates.scores["colbert"] = scores
        candidates.fused += search.weights[2] * standardized(scores)


@dataclass(frozen=True)
class Search:
    """What one call asks for.

    Attributes:
        query: The query.
        k: How many documents.
        count: How many candidates of each signal.
        weights: Of the dense, lexical and ColBERT score.
        where: Chroma's metadata filter.
        where_document: Chroma's filter of texts.
    """

    query: str
    k: int
    count: int
    weights: tuple[float, ...]
    where: Mapping[str, Any] | None
    where_document: Mapping[str, Any] | None

    @property
    def filters(self) -> dict[str, Any]:
        """The filters as Chroma takes them; empty: there are none."""
        filters = {"where": self.where, "where_document": self.where_document}
        return {name: value for name, value in filters.items() if value}


def lexical_best(collection: Collection, scores: LexicalScores, search: Search) -> list[str]:
    """Ids of the passages with the highest lexical scores that pass the filters.

    Args:
        collection: Of the passages.
        scores: Of all of them.
        search: How many, and the filters.
    """
    if not search.filters:
        return scores.ranked(search.count)
    depth = search.count * _FILTERED_DEPTH
    ranked = scores.ranked(depth)
    if not ranked:
        return []
    passing = set(collection.get(ids=ranked, include=[], **search.filters)["ids"])
    found = [passage for passage in ranked if passage in passing]
    if len(found) < search.count and len(ranked) == depth:  # few pass: rank just those
        all_passing = collection.get(include=[], **search.filters)["ids"]
        found = scores.ranked(search.count, among=all_passing)
    return found[: search.count]


@dataclass
class Candidates:
    """`N` passages; every list and array has one entry each.

    Attributes:
        ids: Their ids in the collection.
        texts: What is stored there.
        metadatas: What is stored there.
        fused: What they are ordered by, `(N,)`.
        scores: Scores by signal, `(N,)` each.
    """

    ids: list[str]
    texts: list[str]
    metadatas: list[Mapping[str, Any]]
    fused: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def nearest(cls, collection: Collection, vector: NDArray[np.float32], search: Search) -> Self:
        """The passages with the nearest dense vectors.

        Args:
            collection: In cosine space.
            vector: The query's, `(D,)`.
            search: How many, and the filters.
        """
        found: Any = collection.query(
            query_embeddings=[vector],  # type: ignore[arg-type]
            n_results=search.count,
            include=["documents", "metadatas", "distances"],
            **search.filters,
        )
        columns = (found[name][0] for name in ("ids", "documents", "metadatas", "distances"))
        # A passage without a text was deleted since the index was read.
        rows = [row for row in zip(*columns, strict=True) if row[1] is not None]
        made = cls(
            [row[0] for row in rows],
            [row[1] for row in rows],
            [row[2] or {} for row in rows],
            np.zeros(len(rows), np.float32),
        )
        made.scores["dense"] = 1 - np.array([row[3] for row in rows], np.float32)  # (N,)
        return made

    def add(self, collection: Collection, ids: Sequence[str], vector: NDArray[np.float32]) -> None:
        """Add passages by their ids, those that are still stored."""
        known = set(self.ids)
        new = [passage for passage in ids if passage not in known]
        if not new:
            return
        found: Any = collection.get(ids=new, include=["documents", "metadatas", "embeddings"])
        if not found["ids"]:
            return
        self.ids += found["ids"]
        self.texts += [text or "" for text in found["documents"]]
        self.metadatas += [metadata or {} for metadata in found["metadatas"]]
        dense = _cosines(np.asarray(found["embeddings"], np.float32), vector)
        self.scores["dense"] = np.concatenate([self.scores["dense"], dense])  # (N,)
        self.fused = np.zeros(len(self.ids), np.float32)  # (N,)

    def best(self, count: int) -> Candidates:
        """Those with the highest fused scores, the best first."""
        order = np.argsort(-self.fused, kind="stable")[:count]  # (count,)
        numbers = order.tolist()
        return Candidates(
            [self.ids[n] for n in numbers],
            [self.texts[n] for n in numbers],
            [self.metadatas[n] for n in numbers],
            self.fused[order],
            {signal: values[order] for signal, values in self.scores.items()},
        )

    def documents(self, *, scores: bool) -> list[Document]:
        """As documents, with their scores in the metadata or without."""
        named = {"fused": self.fused, **self.scores} if scores else {}
        return [
            Document(
                text,
                id=passage,
                metadata={
                    **metadata,
                    **{score_key(name): float(v[n]) for name, v in named.items()},
                },
            )
            for n, (passage, text, metadata) in enumerate(
                zip(self.ids, self.texts, self.metadatas, strict=True)
            )
        ]


def warn_caller(message: str) -> None:
    """Warn at the line that called LangChain or this package."""
    level, frame = 1, sys._getframe()  # noqa: SLF001 - as warnings itself does
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("langchain"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        msg = f"{name} is {value}. Ask for 1 or more."
        raise ValueError(msg)
    return value


def _cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of `(N, D)` vectors and a `(D,)` one, `(N,)`; 0 where one has no length."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)  # (N,)
    cosines: NDArray[np.float32] = vectors @ query / np.maximum(norms, np.float32(1e-12))  # (N,)
    return cosines
