"""OpenAI's paths: dense vectors, and which model there is."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from langchain_bge_dense.serve.service import (
    EncodeRequest,
    Purpose,
    floats,
    is_query,
    json_reply,
    refusal,
    service_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

router = APIRouter(tags=["OpenAI"])


class OpenAIRequest(BaseModel):
    """A request of OpenAI's embeddings API; all but `input` may be null."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    input_type: Purpose | None = None
    """Not OpenAI's, but Cohere's and NVIDIA's: which instruction of the server goes in front."""


@router.post("/v1/embeddings")
async def embeddings(http: Request, asked: OpenAIRequest) -> Response:
    """Dense vectors by OpenAI's schema."""
    service = service_of(http)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if texts and isinstance(texts[0], (int, list)):
        msg = (
            "input has token ids, which are of another model's tokenizer. Send strings; "
            "langchain_openai.OpenAIEmbeddings does so with check_embedding_ctx_length=False."
        )
        raise refusal(422, ValueError(msg))
    await service.check(asked.model, asked.dimensions)
    vectors, tokens = await service.dense(
        http,
        EncodeRequest(texts=texts, query=is_query(asked.input_type)),
        _base64 if asked.encoding_format == "base64" else floats,
    )
    data = ", ".join(
        f'{{"object": "embedding", "index": {index}, "embedding": {vector}}}'
        for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    facts = json.dumps({"object": "list", "model": service.names[0], "usage": usage})
    return json_reply(f'{facts[:-1]}, "data": [{data}]}}')


def _base64(vector: NDArray[np.float32]) -> str:
    return f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'


@router.get("/v1/models")
def models(http: Request) -> dict[str, Any]:
    """List the names that the one model answers to."""
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "langchain-bge-dense"}
        for name in service_of(http).names
    ]
    return {"object": "list", "data": data}
