"""Every client that docs/server.md names, made as the page says, against a running server."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Reranker
from langchain_bge_dense.serve import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_bge_dense import BGEM3Embeddings

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
ROW = re.compile(r"^\| ([^|`]+?|`BGEM3Embeddings`) \| `(.+?)` \|$", re.MULTILINE)
PATHS = re.compile(r"^\| (`/.+?) \|", re.MULTILINE)
PLACE = "http://127.0.0.1:8000"

TEXTS = ["free and equal", "什么是稠密向量?", "a dense vector"]
QUERY = "all are free and equal"

_HAYSTACK = "haystack_integrations.components"
MODULES = {
    "BGEM3Embeddings": "langchain_bge_dense",
    "HuggingFaceAPITextEmbedder": f"{_HAYSTACK}.embedders.huggingface_api",
    "HuggingFaceEndpointEmbeddings": "langchain_huggingface",
    "HuggingFaceTEIRanker": f"{_HAYSTACK}.rankers.huggingface_api",
    "InferenceClient": "huggingface_hub",
    "OllamaEmbeddings": "langchain_ollama",
    "OpenAI": "openai",
    "OpenAIEmbeddings": "langchain_openai",
    "OpenAILikeEmbedding": "llama_index.embeddings.openai_like",
    "OpenAITextEmbedder": "haystack.components.embedders",
    "Secret": "haystack.utils",
    "TextEmbeddingsInference": "llama_index.embeddings.text_embeddings_inference",
}
"""Where the names in the page's code come from; others are modules."""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """These libraries send nothing and fetch nothing, and leave connections to the collector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield
    import litellm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        litellm.in_memory_llm_clients_cache.flush_cache()
        litellm.module_level_client.close()
        gc.collect()


def made(code: str, url: str) -> Any:
    """What the code of the page gives, with this server for the page's."""
    assert PLACE in code
    names: dict[str, Any] = {"texts": TEXTS, "query": QUERY}
    for name in set(re.findall(r"\b[A-Za-z]\w+(?=[(.])", code)) - names.keys():
        if name in MODULES:
            names[name] = getattr(import_module(MODULES[name]), name)
        elif name in {"cohere", "litellm", "ollama"}:
            names[name] = import_module(name)
    return eval(code.replace(PLACE, url), names)  # noqa: S307


def openai_vectors(client: Any) -> list[list[float]]:
    with client:
        reply = client.embeddings.create(model="bge-m3", input=TEXTS)
    return [item.embedding for item in reply.data]


def langchain_openai_vectors(client: Any) -> list[list[float]]:
    found = client.embed_documents(TEXTS)
    client.client._client.close()
    return found


def litellm_vectors(reply: Any) -> list[list[float]]:
    return [item["embedding"] for item in reply.data]


def llama_index_vectors(client: Any) -> list[list[float]]:
    assert np.allclose(client.get_query_embedding(TEXTS[0]), client.get_text_embedding(TEXTS[0]))
    return client.get_text_embedding_batch(TEXTS)


def haystack_vectors(client: Any) -> list[list[float]]:
    found = [client.run(text)["embedding"] for text in TEXTS]
    client.close()
    return found


def tei_vectors_of_haystack(client: Any) -> list[list[float]]:
    found = np.array(haystack_vectors(client))  # as long as the model gives them, unless told
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).tolist()


def hub_vectors(client: Any) -> list[list[float]]:
    with client:
        return client.feature_extraction(TEXTS).tolist()


def langchain_ollama_vectors(client: Any) -> list[list[float]]:
    found = client.embed_documents(TEXTS)
    assert np.allclose(client.embed_query(TEXTS[0]), found[0], atol=1e-6)
    client._client._client.close()
    return found


def ollama_vectors(client: Any) -> list[list[float]]:
    found = client.embed("bge-m3", TEXTS).embeddings
    client._client.close()
    return found


VECTORS: dict[str, Callable[[Any], list[list[float]]]] = {
    "`BGEM3Embeddings`": lambda client: client.embed_documents(TEXTS),
    "openai": openai_vectors,
    "langchain-openai": langchain_openai_vectors,
    "LiteLLM": litellm_vectors,
    "LiteLLM, Ollama's paths": litellm_vectors,
    "LlamaIndex, OpenAI-like": llama_index_vectors,
    "LlamaIndex, TEI": llama_index_vectors,
    "Haystack, OpenAI": haystack_vectors,
    "Haystack, TEI": tei_vectors_of_haystack,
    "huggingface_hub": hub_vectors,
    "langchain-ollama": langchain_ollama_vectors,
    "ollama": ollama_vectors,
}


def cohere_scores(client: Any) -> dict[int, float]:
    with client:
        reply = client.rerank(model="bge-m3", query=QUERY, documents=TEXTS)
    return {result.index: result.relevance_score for result in reply.results}


def litellm_scores(reply: Any) -> dict[int, float]:
    assert all(result["document"]["text"] == TEXTS[result["index"]] for result in reply.results)
    return {result["index"]: result["relevance_score"] for result in reply.results}


def haystack_scores(client: Any) -> dict[int, float]:
    import haystack

    documents = [haystack.Document(content=text) for text in TEXTS]
    found = client.run(QUERY, documents)["documents"]
    client.close()
    return {TEXTS.index(document.content): document.score for document in found}


SCORES: dict[str, Callable[[Any], dict[int, float]]] = {
    "cohere": cohere_scores,
    "cohere, v1": cohere_scores,
    "LiteLLM, Cohere": litellm_scores,
    "LiteLLM, Jina": litellm_scores,
    "LiteLLM, vLLM": litellm_scores,
    "LiteLLM, TEI": litellm_scores,
    "Haystack, TEI": haystack_scores,
}

EMBEDDING, RERANKING = (
    dict(ROW.findall(part)) for part in PAGE.split("\nTo rerank the candidates")
)


def test_every_client_of_the_page_is_tried() -> None:
    assert EMBEDDING.keys() == VECTORS.keys()
    assert RERANKING.keys() == SCORES.keys()


def tried(clients: dict[str, str]) -> list[Any]:
    """Names of clients; Haystack's of TEI do not run on Python 3.10."""
    old = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11")
    return [pytest.param(name, marks=[old] * (name == "Haystack, TEI")) for name in clients]


@pytest.mark.parametrize("name", tried(EMBEDDING))
def test_vectors(url: str, tiny: BGEM3Embeddings, name: str) -> None:
    found = VECTORS[name](made(EMBEDDING[name], url))
    assert np.allclose(found, tiny.embed_documents(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", tried(RERANKING))
def test_scores(url: str, tiny: BGEM3Embeddings, name: str) -> None:
    found = SCORES[name](made(RERANKING[name], url))
    documents = [Document(text, id=str(n)) for n, text in enumerate(TEXTS)]
    ordered = BGEM3Reranker(embeddings=tiny).compress_documents(documents, QUERY)
    expected = {int(one.id): one.metadata["bge_m3_relevance_score"] for one in ordered}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-6)


def test_langchain_huggingface(url: str, tiny: BGEM3Embeddings) -> None:
    [making] = re.findall(r"`embeddings = (HuggingFaceEndpointEmbeddings\(.+?\))`", PAGE)
    [client] = re.findall(r"`embeddings\.client = (.+?)`", PAGE)
    embeddings = made(f"{making} or '{PLACE}'", url)
    with made(client, url) as embeddings.client:
        found = embeddings.embed_documents(TEXTS)
    assert np.allclose(found, tiny.embed_documents(TEXTS), rtol=0, atol=1e-6)


def test_the_line_for_users_of_ollama(url: str, tiny: BGEM3Embeddings) -> None:
    [code] = re.findall(r"^ollama = (.+)$", PAGE, re.MULTILINE)
    embeddings = made(code.replace(")", ", validate_model_on_init=True)"), url)
    assert langchain_ollama_vectors(embeddings) == tiny.embed_documents(TEXTS)


def test_the_paths_of_the_page_are_those_of_the_server(tiny: BGEM3Embeddings) -> None:
    named = {path for cell in PATHS.findall(PAGE) for path in re.findall(r"`(/.*?)`", cell)}
    assert named == create_app(tiny).openapi()["paths"].keys()
