"""Reranking by Cohere's client, and in TEI's schema: the scores of `BGEM3Reranker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cohere
import httpx
import pytest
from calls import WAIT, texts
from langchain_core.documents import Document
from model_server import served

from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker

if TYPE_CHECKING:
    from pathlib import Path

QUERY = "free and equal"
TEXTS = ["a dense vector", "all are free and equal", "", "什么是稠密向量?"]


def expected(embeddings: BGEM3Embeddings, passages: list[str]) -> dict[int, float]:
    """Scores by index, the best first."""
    documents = [Document(text, id=str(n)) for n, text in enumerate(passages)]
    found = BGEM3Reranker(embeddings=embeddings).compress_documents(documents, QUERY)
    return {int(one.id): one.metadata["bge_m3_relevance_score"] for one in found}


def alike(found: dict[int, float], others: dict[int, float]) -> bool:
    return list(found) == list(others) and found == pytest.approx(others, abs=1e-6)


def scores_of(results: list[Any]) -> dict[int, float]:
    return {
        result["index"]: result.get("relevance_score", result.get("score")) for result in results
    }


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_coheres_clients(url: str, tiny: BGEM3Embeddings, kind: Any) -> None:
    with httpx.Client(timeout=WAIT) as http:
        client = kind(api_key="any", base_url=url, httpx_client=http)
        reply = client.rerank(model="bge-m3", query=QUERY, documents=TEXTS)
    found = {result.index: result.relevance_score for result in reply.results}
    assert alike(found, expected(tiny, TEXTS))
    tokens = tiny.encode([QUERY, *TEXTS]).token_counts.sum()
    assert reply.meta.tokens.input_tokens == tokens
    assert reply.id


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_cohere_and_jina(http: httpx.Client, tiny: BGEM3Embeddings, path: str) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1], "url": "https://example.org"}, *TEXTS[2:]]
    asked = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    reply = http.post(path, json={**asked, "model": "BAAI/bge-m3"}).raise_for_status().json()
    best = dict(list(expected(tiny, TEXTS).items())[:2])
    assert alike(scores_of(reply["results"]), best)
    for result in reply["results"]:
        assert result["document"] == {"text": TEXTS[result["index"]]}
    assert reply["model"] == "tiny"
    assert reply["usage"]["total_tokens"] == tiny.encode([QUERY, *TEXTS]).token_counts.sum()


def test_text_embeddings_inference(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    scores = expected(tiny, TEXTS)
    for raw in (False, True):
        asked = {"query": QUERY, "texts": TEXTS, "raw_scores": raw, "return_text": raw}
        found = http.post("/rerank", json=asked).raise_for_status().json()
        assert alike(scores_of(found), scores)
        assert all(
            result.get("text") == (TEXTS[result["index"]] if raw else None) for result in found
        )


def test_what_may_be_null(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    names = ("model", "top_n", "return_documents", "texts", "max_tokens_per_doc", "rank_fields")
    asked = {"query": QUERY, "documents": TEXTS, **dict.fromkeys(names)}
    reply = http.post("/v1/rerank", json=asked).raise_for_status().json()
    assert alike(scores_of(reply["results"]), expected(tiny, TEXTS))
    assert "document" not in reply["results"][0]


def test_nothing_in(http: httpx.Client) -> None:
    assert http.post("/rerank", json={"query": QUERY, "documents": []}).json()["results"] == []
    assert http.post("/rerank", json={"query": QUERY, "texts": []}).json() == []


def test_documents_run_in_parts(tiny: BGEM3Embeddings) -> None:
    passages = texts(20)
    with served(tiny, max_texts=192) as url:  # three documents at once
        asked = {"query": QUERY, "documents": passages}
        reply = httpx.post(f"{url}/v1/rerank", json=asked, timeout=WAIT).json()
        assert alike(scores_of(reply["results"]), expected(tiny, passages))
        asked = {"query": QUERY, "documents": ["a"] * 97}
        refused = httpx.post(f"{url}/v1/rerank", json=asked)
    assert refused.status_code == 413
    assert "97 texts are more than the 96" in refused.json()["error"]["message"]


def test_the_query_has_the_servers_instruction(tiny: BGEM3Embeddings) -> None:
    own = BGEM3Embeddings(**{**tiny.model_dump(), "query_instruction": "find: "})
    with served(own) as url:
        reply = httpx.post(f"{url}/rerank", json={"query": QUERY, "texts": TEXTS}).json()
    assert alike(scores_of(reply), expected(own, TEXTS))
    assert not alike(scores_of(reply), expected(tiny, TEXTS))


def test_long_documents(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    passages = ["all are free", "free " * 600]
    own = BGEM3Embeddings(**{**tiny.model_dump(), "max_length": 20, "on_truncate": "ignore"})
    asked = {"query": QUERY, "documents": passages, "max_tokens_per_doc": 20}
    reply = http.post("/v2/rerank", json=asked).raise_for_status().json()
    assert alike(scores_of(reply["results"]), expected(own, passages))
    refused = http.post("/rerank", json={"query": QUERY, "texts": passages, "truncate": False})
    assert refused.json()["error"]["message"].startswith("Text 1 has 1,202 tokens")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"query": QUERY}, "the candidates are documents or texts"),
        ({"query": QUERY, "texts": [], "documents": []}, "the candidates are documents or texts"),
        ({"query": QUERY, "documents": [{"title": "a"}]}, "The request's documents.0"),
        ({"query": QUERY, "documents": ["a"], "rank_fields": ["title"]}, "rank_fields.0 is wrong"),
        ({"query": QUERY, "documents": ["a"], "top_n": 0}, "The request's top_n is wrong"),
        ({"query": QUERY, "documents": ["a"], "model": "rerank-v3.5"}, "not 'rerank-v3.5'"),
    ],
)
def test_wrong_requests(http: httpx.Client, asked: Any, words: str) -> None:
    reply = http.post("/v1/rerank", json=asked)
    assert reply.is_client_error
    assert words in reply.json()["error"]["message"]


def test_a_checkpoint_without_heads_is_refused(dense_only: Path) -> None:
    with served(BGEM3Embeddings(model=dense_only, device="cpu")) as url:
        reply = httpx.post(f"{url}/v1/rerank", json={"query": QUERY, "documents": TEXTS})
    assert reply.status_code == 422
    assert reply.json()["error"]["message"].startswith("'dense-only' is a dense-only checkpoint")
