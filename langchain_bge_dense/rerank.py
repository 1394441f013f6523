"""`BGEM3Reranker`: documents by the weighted dense, lexical and ColBERT scores of BGE-M3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents.compressor import BaseDocumentCompressor
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_bge_dense._scoring import (
    Weights,
    dense_scores,
    lexical_scores,
    maxsim_scores,
    score_key,
    weighted_mean,
)
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import Document
    from numpy.typing import NDArray
    from typing_extensions import Self

    from langchain_bge_dense._engine.encoding import M3Encoding

SIGNALS = ("dense", "lexical", "colbert")


class BGEM3Reranker(BaseDocumentCompressor):
    """Order documents by what all three outputs of BGE-M3 say about a query.

    The score is `BGEM3FlagModel.compute_score`'s: the mean of the three, weighted, as the model
    gives them. `BGEM3Retriever` weights standard scores by default, so that its weights are others.
    Query and documents are each encoded once; a signal with weight 0 is not computed. The score is
    written to the metadata as `bge_m3_relevance_score`, those of the signals as
    `bge_m3_dense_score`, `bge_m3_lexical_score` and `bge_m3_colbert_score`.

    With `vectorstore`, what a store of `open_chroma` keeps of the documents is read from there, and
    a query is one short forward pass.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker
        >>> from langchain_core.documents import Document
        >>> reranker = BGEM3Reranker(embeddings=BGEM3Embeddings(model=checkpoint), top_n=1)
        >>> documents = [Document("equal rights"), Document("a brown fox")]
        >>> [best] = reranker.compress_documents(documents, "equal rights")
        >>> best.page_content, best.metadata["bge_m3_relevance_score"] > 0
        ('equal rights', True)
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    embeddings: BGEM3Embeddings | None = None
    """The model, by default that of `vectorstore`."""
    vectorstore: Any = None
    """A store of `open_chroma` that holds the documents, by their ids; others are encoded."""
    top_n: int | None = Field(None, ge=1)
    """Number of documents to return, by default all."""
    weights: Weights = (0.4, 0.2, 0.4)
    """Of the dense, lexical and ColBERT score; the default is that of BAAI's own example."""

    _model: BGEM3Embeddings = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vectorstore is not None:
            from langchain_bge_dense.chroma.search import model_of

            self._model = model_of(self.vectorstore, self.embeddings)
        elif self.embeddings is not None:
            self._model = self.embeddings
        else:
            msg = "Neither embeddings nor vectorstore is given. Pass a model, a store, or both."
            raise ValueError(msg)
        return self

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - LangChain's signature
    ) -> list[Document]:
        """Order documents by their score, the best first.

        Args:
            documents: N candidates; they are not changed.
            query: The query that they may answer.
            callbacks: Not used.

        Returns:
            The best `top_n` as copies, with their scores in the metadata.

        Raises:
            ValueError: A lexical or ColBERT weight is above 0 and the checkpoint is dense only.
        """
        if not documents:
            return []
        scores = self._scores(query, documents)
        order = np.argsort(-scores["relevance"], kind="stable")[: self.top_n]  # (top_n,)
        return [_with_scores(documents[n], scores, n) for n in order.tolist()]

    def _scores(self, query: str, documents: Sequence[Document]) -> dict[str, NDArray[np.float32]]:
        """Compute the scores by name, each `(N,)`."""
        used = {name: w for name, w in zip(SIGNALS, self.weights, strict=True) if w > 0}
        wanted: Any = {name: name in used for name in SIGNALS}
        model = self._model
        encoded = model.encode([query], query=True, **wanted)
        scores = {name: np.full(len(documents), np.nan, np.float32) for name in used}
        if self.vectorstore is not None:
            from langchain_bge_dense.chroma.signals import key_of

            rows = [row for row, document in enumerate(documents) if document.id]
            keys = [key_of(str(documents[row].id), documents[row].page_content) for row in rows]
            stored = self.vectorstore.passages
            stored.refresh()
            for name, values in stored.scores(encoded, keys).items():
                scores[name][rows] = values
        rest = np.flatnonzero(np.isnan(list(scores.values())).any(axis=0)).tolist()
        if rest:
            passages = model.encode([documents[row].page_content for row in rest], **wanted)
            for name, values in signal_scores(encoded, passages).items():
                scores[name][rest] = values
        relevance = weighted_mean([scores[name] for name in used], list(used.values()))  # (N,)
        return {"relevance": relevance, **scores}


def _with_scores(
    document: Document, scores: dict[str, NDArray[np.float32]], number: int
) -> Document:
    """Copy a document and add its scores to the metadata."""
    added = {score_key(name): float(values[number]) for name, values in scores.items()}
    return document.model_copy(update={"metadata": {**document.metadata, **added}})


def signal_scores(query: M3Encoding, passages: M3Encoding) -> dict[str, NDArray[np.float32]]:
    """Score N passages by each signal that they share with the query, `(N,)` each."""
    scores = {}
    if query.dense is not None and passages.dense is not None:
        scores["dense"] = dense_scores(query.dense[0], passages.dense)
    if query.lexical is not None and passages.lexical is not None:
        scores["lexical"] = lexical_scores(query.lexical[0], passages.lexical)
    if query.colbert is not None and passages.colbert is not None:
        scores["colbert"] = maxsim_scores(query.colbert[0], passages.colbert)
    return scores
