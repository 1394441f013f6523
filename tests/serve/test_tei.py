"""Paths of text-embeddings-inference by the hub's client, and as plain HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from calls import alike, texts
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from model_server import served

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

TEXTS = ["free and equal", "什么是稠密向量?", "dense vectors"]
LONG = "free " * 600


@pytest.fixture
def client(url: str) -> Iterator[InferenceClient]:
    with InferenceClient(url) as client:
        yield client


def test_dense_vectors(client: InferenceClient, url: str, tiny: BGEM3Embeddings) -> None:
    vectors = tiny.embed_documents(TEXTS)
    assert client.feature_extraction(TEXTS).tolist() == vectors
    assert client.feature_extraction(TEXTS, model=f"{url}/embed").tolist() == vectors
    assert client.feature_extraction("free").tolist() == [tiny.embed_query("free")]


def test_lexical_weights(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    found = http.post("/embed_sparse", json={"inputs": [*TEXTS, ""]}).json()
    expected = tiny.encode([*TEXTS, ""], dense=False, lexical=True).lexical
    assert [{item["index"]: item["value"] for item in row} for row in found] == expected
    assert all(row == sorted(row, key=lambda item: item["index"]) for row in found)
    [alone] = http.post("/embed_sparse", json={"inputs": TEXTS[0]}).json()
    assert [item["index"] for item in alone] == sorted(expected[0])


def test_similarities(client: InferenceClient, url: str, tiny: BGEM3Embeddings) -> None:
    found = client.sentence_similarity(TEXTS[0], TEXTS, model=f"{url}/similarity")
    dense = tiny.encode(TEXTS).dense
    assert np.allclose(found, dense @ dense[0], atol=1e-6)
    assert client.sentence_similarity("free", [], model=f"{url}/similarity") == []


def test_lists_of_any_length(tiny: BGEM3Embeddings) -> None:
    passages = texts(20)
    with served(tiny, max_texts=3) as url, InferenceClient(url) as client:
        vectors = tiny.encode(passages).dense
        assert alike(client.feature_extraction(passages), vectors)
        found = client.sentence_similarity(passages[0], passages[1:], model=f"{url}/similarity")
        assert np.allclose(found, vectors[1:] @ vectors[0], atol=1e-6)


def test_what_may_be_null(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    names = ("truncate", "truncation_direction", "prompt_name", "normalize", "dimensions")
    asked = {"inputs": "free", **dict.fromkeys(names)}
    assert http.post("/embed", json=asked).json() == [tiny.embed_query("free")]
    sentences = {"source_sentence": "free", "sentences": ["free"]}
    reply = http.post("/similarity", json={"inputs": sentences, "parameters": None})
    assert reply.json() == pytest.approx([1.0])


def test_a_prompt_is_the_servers_instruction(tiny: BGEM3Embeddings) -> None:
    fields = {"query_instruction": "find: ", "document_instruction": "text: "}
    own = BGEM3Embeddings(**{**tiny.model_dump(), **fields})
    with served(own) as url, InferenceClient(url) as client:
        for name, expected in (
            ("query", "find: free"),
            ("passage", "text: free"),
            (None, "text: free"),
        ):
            found = client.feature_extraction("free", prompt_name=name)
            assert found.tolist() == [tiny.embed_query(expected)]


def test_vectors_as_long_as_the_model_gives_them(
    client: InferenceClient, tiny: BGEM3Embeddings
) -> None:
    raw = BGEM3Embeddings(**{**tiny.model_dump(), "normalize": False}).embed_query("free")
    assert client.feature_extraction("free", normalize=False).tolist() == [raw]
    assert client.feature_extraction("free", normalize=True).tolist() != [raw]


def test_long_texts(client: InferenceClient, tiny: BGEM3Embeddings) -> None:
    cut = tiny.model_copy(update={"on_truncate": "ignore"}).embed_query(LONG)
    for truncate in (None, True):
        assert client.feature_extraction(LONG, truncate=truncate).tolist() == [cut]
    with pytest.raises(HfHubHTTPError, match="Text 0 has 1,202 tokens"):
        client.feature_extraction(LONG, truncate=False)
    with pytest.raises(HfHubHTTPError, match="truncation_direction is wrong"):
        client.feature_extraction(LONG, truncation_direction="left")


@pytest.mark.parametrize("path", ["/embed", "/embed_sparse", "/"])
def test_errors_are_strings(http: httpx.Client, path: str) -> None:
    reply = http.post(path, json={"inputs": ["free", 5]})
    assert reply.status_code == 422
    message = "Text 1 is int, not str. Convert it first, or drop it from the list."
    assert reply.json() == {"error": message, "error_type": "TypeError"}


def test_a_checkpoint_without_heads_has_no_weights(dense_only: Any) -> None:
    import httpx

    with served(BGEM3Embeddings(model=dense_only, device="cpu")) as url:
        assert httpx.post(f"{url}/embed", json={"inputs": "free"}).is_success
        reply = httpx.post(f"{url}/embed_sparse", json={"inputs": "free"})
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("'dense-only' is a dense-only checkpoint")


def test_what_its_clients_read_of_the_info(http: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["model_id"] == "tiny"
    assert info["model_type"] == {"embedding": {"pooling": "cls"}}
    assert info["max_input_length"] == 512
    assert info["max_client_batch_size"] == 2_048
    assert info["auto_truncate"] is True
