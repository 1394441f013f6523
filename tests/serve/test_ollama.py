"""Ollama's paths by Ollama's own client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ollama
import pytest
from model_server import served

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

TEXTS = ["free and equal", "什么是稠密向量?", ""]
LONG = "free " * 600


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    client = ollama.Client(host=url)
    yield client
    client._client.close()


def test_lists_and_single_texts(client: ollama.Client, tiny: BGEM3Embeddings) -> None:
    reply = client.embed("bge-m3", TEXTS)
    expected = tiny.encode(TEXTS)
    assert reply.embeddings == expected.dense.tolist()
    assert reply.prompt_eval_count == expected.token_counts.sum()
    assert reply.total_duration > reply.load_duration >= 0
    assert reply.model == "tiny"
    vector = tiny.embed_query(TEXTS[0])
    assert client.embed("bge-m3", TEXTS[0]).embeddings == [vector]
    assert client.embeddings("bge-m3", TEXTS[0]).embedding == vector


def test_an_empty_text_has_a_vector(client: ollama.Client, tiny: BGEM3Embeddings) -> None:
    assert client.embed("bge-m3", "").embeddings == [tiny.embed_query("")]
    assert client.embeddings("bge-m3", "").embedding == tiny.embed_query("")


def test_no_input_loads_the_model(http: httpx.Client) -> None:
    reply = http.post("/api/embed", json={"model": "bge-m3"}).raise_for_status()
    assert reply.json()["embeddings"] == []


def test_the_models_and_the_version(client: ollama.Client, http: httpx.Client) -> None:
    listed = client.list().models
    assert [model.model for model in listed] == ["tiny:latest", "bge-m3:latest"]
    assert http.get("/api/version").json().keys() == {"version"}


def test_what_may_be_null_and_what_has_no_effect(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    names = ("model", "truncate", "dimensions", "options", "keep_alive")
    for given in (
        dict.fromkeys(names),
        {"model": "bge-m3", "keep_alive": "5m", "options": {"temperature": 0.8, "num_ctx": None}},
    ):
        asked = {**given, "input": "free"}
        found = http.post("/api/embed", json=asked).raise_for_status().json()["embeddings"]
        assert found == [tiny.embed_query("free")]


def test_num_ctx_shortens_texts_and_cannot_lengthen_them(
    client: ollama.Client, tiny: BGEM3Embeddings
) -> None:
    short = BGEM3Embeddings(
        **{**tiny.model_dump(), "max_length": 8, "on_truncate": "ignore"}
    ).embed_query(LONG)
    whole = tiny.model_copy(update={"on_truncate": "ignore"}).embed_query(LONG)
    for tokens, expected in ((8, short), (100_000, whole)):
        options = {"num_ctx": tokens}
        assert client.embed("bge-m3", LONG, options=options).embeddings == [expected]
        assert client.embeddings("bge-m3", LONG, options=options).embedding == expected


def test_truncate_comes_before_the_servers_setting(
    client: ollama.Client, tiny: BGEM3Embeddings
) -> None:
    with pytest.raises(ollama.ResponseError, match="Text 0 has 1,202 tokens"):
        client.embed("bge-m3", LONG, truncate=False)
    with served(BGEM3Embeddings(**{**tiny.model_dump(), "on_truncate": "raise"})) as url:
        strict = ollama.Client(host=url)
        with pytest.raises(ollama.ResponseError, match="Text 0 has 1,202 tokens"):
            strict.embed("bge-m3", LONG)
        assert strict.embed("bge-m3", LONG, truncate=True).embeddings
        strict._client.close()


def test_errors_are_as_its_client_reads_them(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as raised:
        client.embed("nomic-embed-text", TEXTS)
    assert raised.value.status_code == 404
    assert raised.value.error.startswith("This server serves 'tiny' or 'bge-m3', not 'nomic-embed")
    with pytest.raises(ollama.ResponseError, match="32 dimensions, not 16"):
        client.embed("bge-m3", TEXTS, dimensions=16)


def test_a_key_is_sent_as_a_header(tiny: BGEM3Embeddings) -> None:
    with served(tiny, api_key="a key") as url:
        for headers in ({}, {"Authorization": "Bearer a key"}):
            client = ollama.Client(host=url, headers=headers)
            if headers:
                assert client.embed("bge-m3", "free").embeddings
            else:
                with pytest.raises(ollama.ResponseError, match="Missing or invalid API key"):
                    client.embed("bge-m3", "free")
            client._client.close()
