"""`BGEM3Retriever`: hybrid search over a Chroma, by all three signals of BGE-M3."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_bge_dense._engine.calls import warn_caller
from langchain_bge_dense._scoring import Fusion, Weights, checked_weights
from langchain_bge_dense.chroma.search import (
    Candidates,
    Search,
    colbert_scores,
    model_of,
    passing,
)
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
    )
    from langchain_core.documents import Document
    from langchain_core.retrievers import LangSmithRetrieverParams
    from typing_extensions import Self

    from langchain_bge_dense._engine.outputs import M3Encoding
    from langchain_bge_dense.chroma.lexical import LexicalWeights
    from langchain_bge_dense.chroma.passages import Passages

_WITH_CODES, _COMPUTED = 50, 20  # candidates that are scored by ColBERT


class BGEM3Retriever(BaseRetriever):
    """Dense and lexical candidates from a store of `open_chroma`, scored by several signals.

    Each signal's scores are brought to one scale by their mean and standard deviation over the
    query's candidates before they are weighted: a lexical score is a sum over shared tokens and
    has no fixed range, so that raw sums would let long queries count more on one side. Documents
    are ordered by the weighted sum, the fused score: 0 is an average candidate of this query, and
    fused scores of two queries cannot be compared. `BGEM3Reranker` adds raw scores instead.

    In a store of `open_chroma(..., colbert=True)` the ColBERT scores are read from the codes that
    it keeps, and a query is one short forward pass.

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
    weights: Weights = (0.4, 0.2, 1.0)
    """Of the dense, lexical and ColBERT score; the default suits standard scores
    (benchmarks/README.md), that of `BGEM3Reranker` raw ones."""
    fusion: Fusion = "standard"
    """What is weighted and added up: `"standard"` scores, `"raw"` ones, or `"rrf"`, reciprocals of
    60 and the rank."""
    colbert: bool | None = None
    """Score the best candidates by their ColBERT vectors too; None: where the store keeps codes.
    Vectors of passages without codes are computed at query time, which takes seconds on a CPU."""
    colbert_k: int | None = Field(None, ge=1)
    """How many candidates that is; None: 50 in a store that keeps codes, else 20; `k` where that is
    more."""
    filter: dict[str, Any] | None = None
    """Chroma's metadata filter."""
    where_document: dict[str, Any] | None = None
    """Chroma's filter of texts: `{"$contains": "trout"}` for example."""
    scores: bool = False
    """Add `bge_m3_fused_score` and `bge_m3_dense_score`, `bge_m3_lexical_score` and
    `bge_m3_colbert_score`, as the model gives them, to the metadata. Without them a passage is the
    same document for every query, which `MultiQueryRetriever` and others rely on."""

    _warned: set[str] = PrivateAttr(default_factory=set)
    _counted: int | None = PrivateAttr(default=None)  # version of the folder

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._model  # noqa: B018 - raises where it does not fit
        self._check_weights(self.weights)
        return self

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if not any(weights[:2]) and not self._scores_colbert:
            msg = (
                f"The weights are {weights} and ColBERT is not scored, so that nothing counts. "
                "Set colbert=True, or a dense or lexical weight above 0."
            )
            raise ValueError(msg)

    @property
    def _passages(self) -> Passages:
        return self.vectorstore._passages  # type: ignore[no-any-return]  # noqa: SLF001

    @property
    def _model(self) -> BGEM3Embeddings:
        return model_of(self.vectorstore, self.embeddings)

    @property
    def _scores_colbert(self) -> bool:
        return bool(self._passages.colbert) if self.colbert is None else self.colbert

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
            fusion=self.fusion,
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
        model = self._model
        weights = self._lexical_weights() if search.weights[1] else None
        colbert = self._scores_colbert and search.weights[2] > 0
        encoded = model.encode(
            [search.query],
            lexical=weights is not None,
            colbert=colbert,
            query=True,
        )
        candidates = self._candidates(search, encoded, weights)
        if colbert and candidates.ids:
            count = self.colbert_k or (_WITH_CODES if self._passages.colbert else _COMPUTED)
            candidates = candidates.best(max(search.k, count))
            self._add_colbert(search, encoded, candidates)
        return candidates.best(search.k)

    def _lexical_weights(self) -> LexicalWeights | None:
        """The store's weights, read to their end; None: it has none."""
        passages = self._passages
        version = passages.connection.version()
        count = 0  # Chroma goes through all passages for it
        if version is None or version != self._counted:
            count, self._counted = passages.collection.count(), version
        passages.weights.sync()
        lacking = count - len(passages.weights)
        if lacking > 0 and version == passages.connection.version():  # else counted too early
            what = "lexical weights and score 0 lexically"
            self._warn_of(lacking, count, what, kept=passages.lexical)
        return passages.weights if len(passages.weights) else None

    def _warn_of(self, lacking: int, count: int, what: str, *, kept: bool) -> None:
        """Say once what passages lack.

        Args:
            lacking: How many.
            count: Of how many.
            what: They lack.
            kept: Whether the collection keeps it.
        """
        if what not in self._warned:
            self._warned.add(what)
            msg = (
                f"{lacking:,} of {count:,} passages of the collection "
                f"{self._passages.collection.name!r} have no {what}. "
                f"{'Complete' if kept else 'Open it with lexical=True and complete'} them with "
                "store.add_missing(), or set the weight of that score to 0."
            )
            warn_caller(msg)

    def _candidates(
        self, search: Search, encoded: M3Encoding, weights: LexicalWeights | None
    ) -> Candidates:
        """Dense and lexical candidates with the scores of both signals."""
        vector = encoded.dense[0]  # type: ignore[index]
        collection = self._passages.collection
        among = None if weights is None else passing(collection, search)
        candidates = Candidates.nearest(collection, vector, search, among)
        if weights is not None:
            scores = weights.scores(encoded.lexical[0])  # type: ignore[index]
            candidates.add(collection, scores.ranked(search.count, among), vector)
            candidates.scores["lexical"] = scores.of(candidates.keys)
        for signal, weight in zip(("dense", "lexical"), search.weights[:2], strict=True):
            if signal in candidates.scores:
                candidates.fuse(signal, weight, search.fusion)
        return candidates

    def _add_colbert(self, search: Search, encoded: M3Encoding, candidates: Candidates) -> None:
        """Score candidates by MaxSim too."""
        vectors = encoded.colbert[0]  # type: ignore[index]
        scores, lacking = colbert_scores(
            self._passages, self._model, vectors, candidates.keys, candidates.texts
        )
        if lacking and self._passages.colbert:
            what = "ColBERT codes: theirs were computed now"
            self._warn_of(lacking, len(scores), what, kept=True)
        candidates.scores["colbert"] = scores
        candidates.fuse("colbert", search.weights[2], search.fusion)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        msg = f"{name} is {value}. Ask for 1 or more."
        raise ValueError(msg)
    return value
