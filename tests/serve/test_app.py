"""The application as any HTTP client sees it: our own paths, limits, the key, what it counts."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from calls import WAIT, gated, texts
from model_server import served
from safetensors.numpy import load

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine import loading
from langchain_bge_dense.serve import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXTS = ["free and equal", "什么是稠密向量?", ""]
KEY = "sk-of-a-test"
LIMITS = {"max_texts": 192, "max_body": 20_000}


@pytest.fixture(scope="module")
def url(tiny: BGEM3Embeddings) -> Iterator[str]:
    with served(tiny, **LIMITS) as url:
        yield url


def told(embeddings: BGEM3Embeddings, **fields: Any) -> BGEM3Embeddings:
    return BGEM3Embeddings(**{**embeddings.model_dump(), **fields})


class TestEncode:
    def test_json_is_what_encode_gives(self, http: httpx.Client, tiny: BGEM3Embeddings) -> None:
        asked = {"texts": TEXTS, "lexical": True, "colbert": True}
        found = http.post("/encode", json=asked).json()
        expected = tiny.encode(TEXTS, lexical=True, colbert=True)
        assert found == {
            "dense": expected.dense.tolist(),
            "lexical": [{str(id_): w for id_, w in row.items()} for row in expected.lexical],
            "colbert": [vectors.tolist() for vectors in expected.colbert],
            "token_counts": expected.token_counts.tolist(),
            "truncated": [False] * 3,
        }

    def test_safetensors(self, http: httpx.Client, tiny: BGEM3Embeddings) -> None:
        reply = http.post("/encode", json={"texts": TEXTS, "encoding_format": "safetensors"})
        assert reply.headers["content-type"] == "application/vnd.safetensors"
        found = load(reply.content)
        assert found.keys() == {"dense", "token_counts", "truncated"}
        assert np.array_equal(found["dense"], tiny.encode(TEXTS).dense)

    def test_nothing_in(self, http: httpx.Client) -> None:
        asked = {"texts": [], "lexical": True, "colbert": True}
        assert http.post("/encode", json=asked).json()["dense"] == []
        assert http.post("/encode", json={**asked, "encoding_format": "safetensors"}).is_success

    def test_the_servers_settings_hold_where_none_are_given(self, tiny: BGEM3Embeddings) -> None:
        own = told(
            tiny,
            query_instruction="find: ",
            document_instruction="text: ",
            max_length=16,
            normalize=False,
            on_truncate="raise",
        )
        with served(own) as url:

            def vector(**asked: Any) -> list[float]:
                reply = httpx.post(f"{url}/encode", json={"texts": ["free"], **asked}).json()
                return reply["dense"][0]

            assert vector() == own.embed_documents(["free"])[0]
            assert vector(query=True) == own.embed_query("free")
            other = told(own, document_instruction="other: ", max_length=20, normalize=True)
            given = {"instruction": "other: ", "max_length": 20, "normalize": True}
            assert vector(**given) == other.embed_documents(["free"])[0]
            long = httpx.post(f"{url}/encode", json={"texts": ["free", "free " * 20]})
            assert long.status_code == 422
            assert long.json()["error"]["message"].startswith("Text 1 has ")
            cut = {"texts": ["free " * 20], "on_truncate": "ignore"}
            assert httpx.post(f"{url}/encode", json=cut).json()["truncated"] == [True]

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"texts": "free"}, "The request's texts is wrong: Input should be a valid list"),
            ({"texts": [], "max_lenght": 4}, "The request's max_lenght is wrong: Extra inputs"),
            ({"texts": ["a"], "max_length": 513}, "max_length=513 is more than the 512 positions"),
            ({"texts": ["a"], "dense": False}, "No output is asked for"),
            ({"texts": ["a", {}], "first": 10}, "Text 11 is dict, not str"),
            ({"texts": ["a\ud800"]}, "Text 0 has a lone surrogate"),
        ],
    )
    def test_wrong_requests(self, http: httpx.Client, asked: Any, words: str) -> None:
        import json

        reply = http.post("/encode", content=json.dumps(asked), headers=JSON)
        assert reply.status_code == 422
        assert reply.json()["error"]["message"].startswith(words)

    def test_what_is_no_json(self, http: httpx.Client) -> None:
        reply = http.post("/encode", content=b'{"texts":', headers=JSON)
        assert reply.status_code == 422
        assert "is wrong: JSON decode error" in reply.json()["error"]["message"]


JSON = {"Content-Type": "application/json"}


class TestLimits:
    def test_texts(self, http: httpx.Client) -> None:
        for asked in ({"texts": ["a"] * 193}, {"texts": ["a"] * 4, "colbert": True}):
            reply = http.post("/encode", json=asked)
            assert reply.status_code == 413
            assert "Send them in parts" in reply.json()["error"]["message"]
        assert http.post("/encode", json={"texts": ["a"] * 192}).is_success

    @pytest.mark.parametrize("path", ["/encode", "/v1/embeddings", "/tokenize"])
    def test_bodies_of_known_and_of_unknown_length(self, http: httpx.Client, path: str) -> None:
        body = b'{"texts": ["%b"]}' % (b"a" * 30_000)
        for content in (body, iter([body[:9_000], body[9_000:]])):
            reply = http.post(path, content=content, headers=JSON)
            assert reply.status_code == 413
            assert "larger than the 20,000 bytes" in reply.json()["error"]["message"]

    def test_the_queue(self, tiny: BGEM3Embeddings) -> None:
        with served(tiny, max_queue=2) as url, gated(tiny) as gate, ThreadPoolExecutor(2) as pool:
            gate.go_on.clear()

            def ask() -> httpx.Response:
                return httpx.post(f"{url}/encode", json={"texts": ["free"]}, timeout=WAIT)

            running = [pool.submit(ask) for _ in range(2)]
            until(lambda: metric(url, "bge_m3_queue") == 2)
            refused = ask()
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            gate.go_on.set()
            assert [one.result(WAIT).status_code for one in running] == [200, 200]
            assert ask().is_success

    @pytest.mark.parametrize(
        ("path", "pooling"),  # settings that no other test has: the model is not shared
        [("/encode", "mean"), ("/v1/embeddings", "cls")],
    )
    def test_the_queue_while_the_model_loads(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, path: str, pooling: str
    ) -> None:
        go_on, load = Event(), loading.load_encoder

        def slow(*settings: Any) -> Any:
            go_on.wait(WAIT)
            return load(*settings)

        monkeypatch.setattr(loading, "load_encoder", slow)
        new = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype="float16", pooling=pooling)
        with served(new, max_queue=1) as url, ThreadPoolExecutor(1) as pool:

            def ask() -> httpx.Response:
                asked = {"texts": ["free"]} if path == "/encode" else {"input": ["free"]}
                return httpx.post(f"{url}{path}", json=asked, timeout=WAIT)

            waiting = pool.submit(ask)
            until(lambda: metric(url, "bge_m3_queue") == 1)
            assert ask().status_code == 429
            go_on.set()
            assert waiting.result(WAIT).is_success


@pytest.fixture(scope="module")
def locked(tiny: BGEM3Embeddings) -> Iterator[str]:
    with served(tiny, api_key=KEY) as url:
        yield url


class TestKey:
    @pytest.mark.parametrize("given", [None, "Bearer sk-of-another", KEY, "Bearer"])
    def test_without_it(self, locked: str, given: str | None) -> None:
        headers = {} if given is None else {"Authorization": given}
        for method, path in (("POST", "/encode"), ("GET", "/info"), ("GET", "/metrics")):
            reply = httpx.request(method, locked + path, headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "PermissionError"

    def test_with_it(self, locked: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, logger="uvicorn")
        headers = {"Authorization": f"Bearer {KEY}"}
        reply = httpx.post(f"{locked}/encode", json={"texts": ["free"]}, headers=headers)
        assert reply.is_success
        assert KEY not in caplog.text

    def test_what_is_open(self, locked: str) -> None:
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert httpx.get(locked + path).is_success


async def test_who_hangs_up_is_not_computed(url: str, tiny: BGEM3Embeddings) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=WAIT) as http:
        with gated(tiny) as gate:
            gate.go_on.clear()
            first = asyncio.create_task(http.post("/encode", json={"texts": ["it runs"]}))
            await asyncio.to_thread(gate.entered.wait, WAIT)
            gone = asyncio.create_task(http.post("/encode", json={"texts": texts(100)}))
            await asyncio.to_thread(until, lambda: metric(url, "bge_m3_queue") == 2)
            gone.cancel()
            await asyncio.to_thread(until, lambda: metric(url, "bge_m3_queue") == 1)
            gate.go_on.set()
            assert (await first).is_success
            assert (await http.post("/encode", json={"texts": ["next"]})).is_success
            assert gate.batches == [1, 1]


async def test_a_failure_of_its_own_is_json(
    tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which a client tells it from what Ray Serve says of a replica that died."""
    app = create_app(tiny)
    monkeypatch.setattr(app.state.service, "info", lambda: 1 / 0)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        reply = await http.get("/info")
    assert reply.status_code == 500
    assert reply.json()["error"]["message"].startswith("The server failed with ZeroDivisionError.")


def test_info_says_what_is_served(http: httpx.Client, tiny: BGEM3Embeddings) -> None:
    info = http.get("/info").json()
    assert info["fingerprint"] == tiny.fingerprint
    assert (info["dimension"], info["positions"]) == (32, 512)
    assert info["limits"] == {"texts": 192, "colbert_texts": 3, "body": 20_000, "queue": 256}


def test_it_is_ready_once_the_model_is_loaded(tiny: BGEM3Embeddings) -> None:
    with served(told(tiny)) as url:
        assert httpx.get(f"{url}/health").is_success
        assert httpx.get(f"{url}/ready").status_code == 503
        reply = httpx.post(f"{url}/encode", json={"texts": ["free"]}, timeout=WAIT)
        assert reply.json()["dense"][0] == tiny.embed_query("free")
        assert httpx.get(f"{url}/ready").is_success


def test_metrics_count_requests_texts_and_tokens(tiny: BGEM3Embeddings) -> None:
    with served(tiny) as url:
        httpx.post(f"{url}/encode", json={"texts": TEXTS})
        httpx.post(f"{url}/v1/embeddings", json={"input": "free"})
        httpx.post(f"{url}/encode", json={"texts": [None]})
        httpx.get(f"{url}/no-such-page")
        count = 'bge_m3_requests_total{path="%s",status="%s"}'
        assert metric(url, count % ("/encode", 200)) == 1
        assert metric(url, count % ("/encode", 422)) == 1
        assert metric(url, count % ("/v1/embeddings", 200)) == 1
        assert metric(url, count % ("", 404)) == 1
        assert metric(url, "bge_m3_texts_total") == 4
        tokens = tiny.encode([*TEXTS, "free"]).token_counts.sum()
        assert metric(url, "bge_m3_tokens_total") == tokens
        assert metric(url, "bge_m3_queue") == 0
        assert metric(url, 'bge_m3_request_seconds_count{path="/encode"}') == 2


def metric(url: str, name: str) -> float | None:
    lines = httpx.get(f"{url}/metrics", timeout=WAIT).text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")]
    return values[0] if values else None


def until(holds: Any) -> None:
    give_up = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_the_openapi_page_names_every_path(tiny: BGEM3Embeddings) -> None:
    paths = create_app(tiny).openapi()["paths"]
    ours = {"/encode", "/tokenize", "/tokens", "/info", "/health", "/ready", "/metrics"}
    openai = {"/v1/embeddings", "/v1/models"}
    rerank = {"/v1/rerank", "/v2/rerank", "/rerank"}
    tei = {"/", "/embed", "/embed_sparse", "/similarity"}
    ollama = {"/api/embed", "/api/embeddings", "/api/tags", "/api/version"}
    assert paths.keys() == ours | openai | rerank | tei | ollama
    assert all(next(iter(path.values()))["description"] for path in paths.values())
