"""`BGEM3Retriever`: hybrid search over a Chroma, by all three signals of BGE-M3."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_bge_dense._engine.calls import warn_caller
from langchain_bge_dense._scoring import Fusion, Weights
from langchain_bge_dense.chroma.search import Candidates, Search, find, model_of
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
    """The model, by default the store's own."""
    k: int = Field(4, ge=1)
    """Number of documents to return."""
    fetch_k: int = Field(50, ge=1)
    """Candidates of the dense and of the lexical signal each, at least `k`."""
    weights: Weights = (0.4, 0.2, 1.0)
    """Weights of the dense, lexical and ColBERT score. The default suits standard scores
    (benchmarks/README.md), that of `BGEM3Reranker` raw ones."""
    fusion: Fusion = "standard"
    """Scores that are weighted and added: `"standard"` or `"raw"` ones, or `"rrf"`, reciprocals of
    60 and the rank."""
    colbert: bool | None = None
    """Score the best candidates by their ColBERT vectors too, by default if the store has codes.
    Vectors of passages without codes are computed at query time, which takes seconds on a CPU."""
    colbert_k: int | None = Field(None, ge=1)
    """Number of candidates scored by ColBERT, at least `k`; by default 50 if the store has codes,
    else 20."""
    filter: dict[str, Any] | None = None
    """Chroma's metadata filter."""
    where_document: dict[str, Any] | None = None
    """Chroma's filter of texts: `{"$contains": "trout"}` for example."""
    scores: bool = False
    """Add `bge_m3_fused_score` and `bge_m3_dense_score`, `bge_m3_lexical_score` and
    `bge_m3_colbert_score`, as the model gives them, to the metadata. Without them a passage is the
    same document for every query, which `MultiQueryRetriever` and others rely on."""

    _warned: set[str] = PrivateAttr(default_factory=set)
    _model: BGEM3Embeddings = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._model = model_of(self.vectorstore, self.embeddings)
        colbert = self.vectorstore.colbert if self.colbert is None else self.colbert
        if not any(self.weights[:2]) and not colbert:
            msg = (
                f"The weights are {self.weights} and ColBERT is off, so that no signal is scored. "
                "Set colbert=True, or a dense or lexical weight above 0."
            )
            raise ValueError(msg)
        return self

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        """Name model and store for traces."""
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
        given = {
            "k": k,
            "fetch_k": fetch_k,
            "weights": weights,
            "filter": filter,
            "where_document": where_document,
        }
        asked = self._with({name: value for name, value in given.items() if value is not None})
        return asked.search(query).documents(scores=self.scores)

    def _with(self, options: dict[str, Any]) -> Self:
        """Make a validated copy with the options of one call."""
        if not options:
            return self
        return type(self)(**{**dict(self), **options}).sharing(self._warned)

    def sharing(self, warned: set[str]) -> Self:
        """Share the warnings that were given with another retriever."""
        self._warned = warned
        return self

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        call = partial(self._get_relevant_documents, run_manager=run_manager.get_sync(), **options)
        return await run_in_executor(None, call, query)

    def search(self, query: str) -> Candidates:
        """Find the best passages, with the scores of all signals."""
        filters = {"where": self.filter, "where_document": self.where_document}
        search = Search(
            query,
            k=self.k,
            count=max(self.k, self.fetch_k),
            weights=self.weights,
            fusion=self.fusion,
            colbert=self.colbert,
            colbert_k=self.colbert_k,
            filters={name: value for name, value in filters.items() if value},
        )
        found = find(self.vectorstore.passages, self._model, search)
        lacking, count = found.unweighted
        if lacking:
            what = "lexical weights and score 0 lexically"
            self._warn_of(lacking, count, what, kept=self.vectorstore.lexical)
        if found.uncoded:
            what = "ColBERT codes: theirs were computed now"
            self._warn_of(found.uncoded, found.scored, what, kept=True)
        return found

    def _warn_of(self, lacking: int, count: int, what: str, *, kept: bool) -> None:
        """Warn once of signals that passages lack.

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
                f"{self.vectorstore.passages.collection.name!r} have no {what}. "
                f"{'Complete' if kept else 'Open it with lexical=True and complete'} them with "
                "store.add_missing(), or set the weight of that score to 0."
            )
            warn_caller(msg)
