"""Paths of text-embeddings-inference: dense vectors, lexical weights, similarities.

Its `/rerank` is in `rerank.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from langchain_bge_dense._scoring import dense_scores
from langchain_bge_dense.serve.service import (
    EncodeRequest,
    Purpose,
    floats,
    is_query,
    json_reply,
    on_truncate,
    service_of,
)

if TYPE_CHECKING:
    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.serve.service import Service

router = APIRouter(tags=["text-embeddings-inference"])


class Parameters(BaseModel):
    """Options of encoding, by default the server's."""

    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] | None = None
    prompt_name: Purpose | None = None

    def request(self, texts: list[Any], **outputs: Any) -> EncodeRequest:
        """Convert to a request of the service."""
        query, cut = is_query(self.prompt_name), on_truncate(self.truncate)
        return EncodeRequest(texts=texts, query=query, on_truncate=cut, **outputs)


class SparseRequest(Parameters):
    """A text, or many."""

    inputs: str | list[Any]

    @property
    def texts(self) -> list[Any]:
        """Texts of a request."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class EmbedRequest(SparseRequest):
    """A text, or many, and how wide and long their vectors are."""

    normalize: bool | None = None
    dimensions: int | None = None


class Sentences(BaseModel):
    """A text, and others to compare it with."""

    source_sentence: str
    sentences: list[Any]


class SimilarityRequest(BaseModel):
    """Texts to compare."""

    inputs: Sentences
    parameters: Parameters | None = None


@router.post("/embed")
@router.post("/")
async def embed(http: Request, asked: EmbedRequest) -> Response:
    """Dense vectors."""
    service = service_of(http)
    await service.check(None, asked.dimensions)
    wanted = asked.request(asked.texts, normalize=asked.normalize)
    vectors, _ = await service.dense(http, wanted, floats)
    return json_reply(f"[{', '.join(vectors)}]")


@router.post("/embed_sparse")
async def embed_sparse(http: Request, asked: SparseRequest) -> Response:
    """Lexical weights: token id and weight of each token that a text has, by id."""
    wanted = asked.request(asked.texts, dense=False, lexical=True)
    parts = await service_of(http).encode(http, wanted, _sparse)
    return json_reply(f"[{', '.join(row for part in parts for row in part)}]")


def _sparse(encoding: M3Encoding) -> list[str]:
    return [
        json.dumps([{"index": id_, "value": weight} for id_, weight in sorted(row.items())])
        for row in encoding.lexical or []
    ]


@router.post("/similarity")
async def similarity(http: Request, asked: SimilarityRequest) -> list[float]:
    """Compute the cosines of a text to others."""
    texts = [asked.inputs.source_sentence, *asked.inputs.sentences]
    wanted = (asked.parameters or Parameters()).request(texts, normalize=True)
    parts = await service_of(http).encode(http, wanted, lambda part: part.dense)
    vectors = np.concatenate([part for part in parts if part is not None])  # (1 + N, D)
    cosines: list[float] = dense_scores(vectors[0], vectors[1:]).tolist()
    return cosines


def info(service: Service) -> dict[str, Any]:
    """Answer with the fields of `/info` that its clients read."""
    return {
        "model_id": service.names[0],
        "model_type": {"embedding": {"pooling": service.info()["pooling"]}},
        "max_input_length": service.max_length,
        "max_client_batch_size": service.limits["texts"],
        "max_concurrent_requests": service.limits["queue"],
        "auto_truncate": service.embeddings.on_truncate != "raise",
    }
