"""`BGEM3Retriever`: hybrid search over a local Chroma, by all three signals of BGE-M3."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_bge_dense._candidates import Candidates
from langchain_bge_dense._scoring import maxsim_scores, standardized
from langchain_bge_dense.embeddings import BGEM3Embeddings
from langchain_bge_dense.rerank import Weights

if TYPE_CHECKING:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from typing_extensions import Self

    from langchain_bge_dense._encoding import M3Encoding
    from langchain_bge_dense._lexical import LexicalIndex

_COLBERT_CANDIDATES = 20
_FILTERED_DEPTH = 10  # lexical candidates are looked up before the filter can drop them


class BGEM3Retriever(BaseRetriever):
    """Dense and lexical candidates from a store of `open_chroma`, scored by several signals.

    Each signal's scores are brought to one scale by their mean and standard deviation over the
    query's candidates before they are weighted: a lexical score is a sum over shared tokens and
    has no fixed range, so that raw sums would let long queries count more on one side.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
        >>> from langchain_bge_dense.chroma import index_documents, open_chroma
        >>> from langchain_core.documents import Document
        >>> store = open_chroma(BGEM3Embeddings(model=checkpoint), "rights")
        >>> documents = [Document("equal rights"), Document("a brown fox")]
        >>> _ = index_documents(store, documents, lexical=True)
        >>> BGEM3Retriever(vectorstore=store, k=1).invoke("equal rights")[0].page_content
        'equal rights'
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    vectorstore: Any
    """A `Chroma` of `open_chroma`, filled by `index_documents(..., lexical=True)`."""
    embeddings: BGEM3Embeddings | None = None
    """The model; None: the store's own."""
    k: int = Field(4, ge=1)
    """How many documents to return; also taken by `invoke`."""
    fetch_k: int = Field(50, ge=1)
    """Candidates of each of the dense and the lexical signal."""
    weights: Weights = (0.4, 0.2, 0.4)
    """Of the dense, lexical and ColBERT score."""
    colbert: bool = False
    """Score the best 20 candidates by their ColBERT vectors too, computed at query time."""
    filter: dict[str, Any] | None = None
    """Chroma's metadata filter."""

    _told: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        from langchain_chroma import Chroma

        from langchain_bge_dense._collection import check

        if not isinstance(self.vectorstore, Chroma):
            msg = f"vectorstore is {type(self.vectorstore).__name__}. Use a store of open_chroma."
            raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
        check(self.vectorstore._collection, self._model().fingerprint)  # noqa: SLF001
        if not self.colbert and not any(self.weights[:2]):
            msg = (
                f"The weights are {self.weights} and colbert is False, so that nothing counts. "
                "Set colbert=True, or a dense or lexical weight above 0."
            )
            raise ValueError(msg)
        return self

    def _model(self) -> BGEM3Embeddings:
        model = self.embeddings or self.vectorstore.embeddings
        if not isinstance(model, BGEM3Embeddings):
            msg = (
                f"The store's embeddings are {type(model).__name__}, not BGEM3Embeddings. Open the "
                "store with BGEM3Embeddings, or pass the ones that filled it as `embeddings`."
            )
            raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
        return model

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's signature
        k: int | None = None,
        **_: Any,
    ) -> list[Document]:
        k = self.k if k is None else k
        if k < 1:
            msg = f"k is {k}. Ask for 1 document or more."
            raise ValueError(msg)
        index = self._index() if self.weights[1] else None
        by_colbert = self.colbert and self.weights[2] > 0
        asked = self._model().encode(
            [query],
            lexical=index is not None,
            colbert=by_colbert,
            instruction=self._model().query_instruction,
        )
        candidates = self._candidates(asked, index, max(k, self.fetch_k))
        if by_colbert:
            candidates = candidates.best(max(k, _COLBERT_CANDIDATES))
            self._add_colbert(asked, candidates)
        return candidates.best(k).documents()

    def _index(self) -> LexicalIndex | None:
        from langchain_bge_dense._lexical import index_of

        index = index_of(self.vectorstore, create=False)
        if index is None and not self._told:
            self._told = True
            name = self.vectorstore._collection.name  # noqa: SLF001 - Chroma has no public name
            msg = (
                f"The collection {name!r} has no lexical weights, so that only dense candidates "
                "are found. Fill it with index_documents(..., lexical=True), or set the lexical "
                "weight to 0."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        return index

    def _candidates(self, asked: M3Encoding, index: LexicalIndex | None, count: int) -> Candidates:
        """Dense and lexical candidates with the scores of both signals."""
        vector = asked.dense[0]  # type: ignore[index]
        collection = self.vectorstore._collection  # noqa: SLF001 - Chroma's own gives no vectors
        candidates = Candidates.nearest(collection, vector, count, self.filter)
        if index is not None:
            index.sync()
            scores = index.scores(asked.lexical[0])  # type: ignore[index]
            depth = count if self.filter is None else count * _FILTERED_DEPTH
            candidates.add(collection, index.ranked(scores, depth), vector, self.filter)
            candidates.scores["lexical"] = index.scores_of(scores, candidates.ids, candidates.texts)
        for signal, weight in zip(("dense", "lexical"), self.weights[:2], strict=True):
            if signal in candidates.scores:
                candidates.relevance += weight * standardized(candidates.scores[signal])
        return candidates

    def _add_colbert(self, asked: M3Encoding, candidates: Candidates) -> None:
        """Score candidates by MaxSim, too, and add it to their relevance."""
        if not candidates.ids:
            return
        passages = self._model().encode(candidates.texts, dense=False, colbert=True).colbert
        scores = maxsim_scores(asked.colbert[0], passages or [])  # type: ignore[index]
        candidates.scores["colbert"] = scores
        candidates.relevance += self.weights[2] * standardized(scores)
