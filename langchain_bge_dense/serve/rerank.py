"""Reranking by the schemas of Cohere and Jina, and of text-embeddings-inference."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from langchain_bge_dense._scoring import weighted_mean
from langchain_bge_dense.rerank import BGEM3Reranker, signal_scores
from langchain_bge_dense.serve.service import EncodeRequest, on_truncate, service_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from langchain_bge_dense._engine.encoding import M3Encoding

router = APIRouter(tags=["rerank"])

_WEIGHTS = BGEM3Reranker.model_fields["weights"].default
_OUTPUTS = {"dense": True, "lexical": True, "colbert": True}


class Document(BaseModel):
    """A document as an object; what it has beside its text is for whoever sent it."""

    text: str


class RerankRequest(BaseModel):
    """A query, and its candidates as `documents` (Cohere, Jina) or as `texts` (TEI)."""

    query: str
    documents: list[str | Document] | None = None
    texts: list[str] | None = None
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    rank_fields: list[Literal["text"]] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=3)] | None = None
    truncate: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.documents is None) == (self.texts is None):
            msg = "the candidates are documents or texts, one of the two"
            raise ValueError(msg)
        return self

    @property
    def candidates(self) -> list[str]:
        """N texts."""
        given = self.documents if self.texts is None else self.texts
        return [one if isinstance(one, str) else one.text for one in given or []]


@router.post("/v1/rerank")
@router.post("/v2/rerank")
@router.post("/rerank")
async def rerank(http: Request, asked: RerankRequest) -> Any:
    """Rank candidates by the mean of their dense, lexical and ColBERT scores, the best first."""
    service, texts = service_of(http), asked.candidates
    await service.check(asked.model)
    scores, tokens = await _scores(http, asked, texts)
    order = np.argsort(-scores, kind="stable")[: asked.top_n].tolist()  # (top_n,)
    if asked.texts is not None:
        with_text = asked.return_text
        return [
            {"index": n, "score": float(scores[n]), **({"text": texts[n]} if with_text else {})}
            for n in order
        ]
    results = [
        {
            "index": n,
            "relevance_score": float(scores[n]),
            **({"document": {"text": texts[n]}} if asked.return_documents else {}),
        }
        for n in order
    ]
    return {
        "id": str(uuid.uuid4()),
        "model": service.names[0],
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"tokens": {"input_tokens": tokens, "output_tokens": 0}},
    }


async def _scores(
    http: Request, asked: RerankRequest, texts: list[str]
) -> tuple[NDArray[np.float32], int]:
    """Score N candidates, `(N,)`, and count the tokens of query and candidates."""
    service, cut = service_of(http), on_truncate(asked.truncate)
    question = EncodeRequest(texts=[asked.query], query=True, on_truncate=cut, **_OUTPUTS)
    [query] = await service.encode(http, question, lambda encoding: encoding)

    def scored(passages: M3Encoding) -> tuple[NDArray[np.float32], int]:
        signals = list(signal_scores(query, passages).values())
        return weighted_mean(signals, _WEIGHTS), int(passages.token_counts.sum())

    longest = service.at_most(asked.max_tokens_per_doc)
    wanted = EncodeRequest(texts=texts, max_length=longest, on_truncate=cut, **_OUTPUTS)
    parts = await service.encode(http, wanted, scored)
    tokens = int(query.token_counts.sum()) + sum(count for _, count in parts)
    return np.concatenate([part for part, _ in parts]), tokens
