"""OpenAI's paths by OpenAI's client, and what other clients send there."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from calls import WAIT, alike, texts
from model_server import ModelServer, served

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXTS = ["free and equal", "什么是稠密向量?", ""]
KEY = "sk-of-a-test"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_lists(client: openai.OpenAI, tiny: BGEM3Embeddings, encoding_format: Any) -> None:
    reply = client.embeddings.create(model="bge-m3", input=TEXTS, encoding_format=encoding_format)
    found = [item.embedding for item in reply.data]
    if encoding_format == "base64":
        found = [np.frombuffer(base64.b64decode(item), "<f4").tolist() for item in found]
    expected = tiny.encode(TEXTS)
    assert found == expected.dense.tolist()
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == expected.token_counts.sum()
    assert reply.model == "tiny"


def test_a_string_and_no_format(client: openai.OpenAI, tiny: BGEM3Embeddings) -> None:
    [item] = client.embeddings.create(model="bge-m3", input=TEXTS[1]).data
    assert item.embedding == tiny.embed_query(TEXTS[1])


def test_every_optional_field_may_be_null(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    names = ("model", "encoding_format", "dimensions", "input_type", "user")
    asked = {"input": "free", **dict.fromkeys(names)}
    [item] = http.post("/v1/embeddings", json=asked).raise_for_status().json()["data"]
    assert item["embedding"] == tiny.embed_query("free")


def test_nothing_in(http: httpx.Client) -> None:
    reply = http.post("/v1/embeddings", json={"input": []}).json()
    assert reply["data"] == []
    assert reply["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_what_it_cannot_do_is_said(client: openai.OpenAI) -> None:
    for given, words in (
        ({"input": [[5, 6]]}, "check_embedding_ctx_length=False"),
        ({"input": [5, 6]}, "Send strings"),
        ({"input": ["a", None]}, "Text 1 is NoneType, not str"),
        ({"input": "a", "dimensions": 64}, "'tiny' has 32 dimensions, not 64"),
    ):
        with pytest.raises(openai.UnprocessableEntityError, match=words):
            client.embeddings.create(model="bge-m3", **given)


def test_a_query_has_the_servers_instruction(tiny: BGEM3Embeddings) -> None:
    own = BGEM3Embeddings(**{**tiny.model_dump(), "query_instruction": "find: "})
    with served(own) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        for kinds, expected in (
            (("query", "search_query"), "find: free"),
            (("document", "search_document", "passage"), "free"),
        ):
            for kind in kinds:
                [item] = client.embeddings.create(
                    model="bge-m3", input="free", extra_body={"input_type": kind}
                ).data
                assert item.embedding == tiny.embed_query(expected)


class TestNames:
    def test_those_that_it_answers_to(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["tiny", "bge-m3"]

    @pytest.mark.parametrize(
        "name", ["", "tiny", "bge-m3", "BAAI/bge-m3", "BGE-M3", "bge-m3:latest", "bge-m3:567m"]
    )
    def test_owner_tag_and_case_do_not_count(self, client: openai.OpenAI, name: str) -> None:
        assert client.embeddings.create(model=name, input="free").model == "tiny"

    @pytest.mark.parametrize("name", ["text-embedding-3-small", "bge-m3-unsupervised", "m3"])
    def test_another_model_is_refused(self, client: openai.OpenAI, name: str) -> None:
        with pytest.raises(openai.NotFoundError, match=f"'tiny' or 'bge-m3', not '{name}'"):
            client.embeddings.create(model=name, input="free")

    def test_without_its_heads_it_is_no_bge_m3(self, dense_only: Path) -> None:
        with (
            served(BGEM3Embeddings(model=dense_only, device="cpu")) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client,
        ):
            assert client.embeddings.create(model="dense-only", input="free").data
            with pytest.raises(openai.NotFoundError, match="This server serves 'dense-only', not"):
                client.embeddings.create(model="bge-m3", input="free")

    def test_aliases_of_the_command_line(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        options = ["--model", str(tiny_checkpoint), "--alias", "text-embedding-3-small"]
        with (
            ModelServer(tmp_path, *options, "--alias", "ada") as server,
            openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY) as client,
        ):
            for name in ("text-embedding-3-small", "ada"):
                assert client.embeddings.create(model=name, input="free").model == "tiny"


@pytest.fixture(scope="module")
def in_threes(tiny: BGEM3Embeddings) -> Iterator[str]:
    with served(tiny, max_texts=3, max_queue=1) as url:
        yield f"{url}/v1/embeddings"


class TestParts:
    """A server that encodes three texts at once takes 96 of clients that cannot split."""

    def test_longer_lists_run_in_parts(self, in_threes: str, tiny: BGEM3Embeddings) -> None:
        passages = texts(20)
        reply = httpx.post(in_threes, json={"input": passages}, timeout=WAIT).json()
        found = [item["embedding"] for item in reply["data"]]
        assert alike(found, tiny.embed_documents(passages))
        assert [item["index"] for item in reply["data"]] == list(range(20))
        assert reply["usage"]["total_tokens"] == tiny.encode(passages).token_counts.sum()

    def test_errors_name_the_text_by_its_index_in_the_list(self, in_threes: str) -> None:
        reply = httpx.post(in_threes, json={"input": [*texts(7), None]})
        assert reply.json()["error"]["message"].startswith("Text 7 is NoneType, not str")

    def test_no_list_is_longer_than_32_parts(self, in_threes: str) -> None:
        assert httpx.post(in_threes, json={"input": ["a"] * 96}, timeout=WAIT).is_success
        reply = httpx.post(in_threes, json={"input": ["a"] * 97})
        assert reply.status_code == 413
        assert "97 texts are more than the 96" in reply.json()["error"]["message"]
