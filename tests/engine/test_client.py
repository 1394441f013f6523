"""`BGEM3Embeddings` on a server beside the same one in this process: no difference but torch."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from calls import WAIT, alike, gated, texts
from chroma_server import ChromaServer
from langchain_core.documents import Document
from model_server import HOST, ModelServer, free_port, served
from pydantic import ValidationError

from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker
from langchain_bge_dense._engine import client
from langchain_bge_dense._engine.client import Client
from langchain_bge_dense.matches import find_matches
from langchain_bge_dense.sparse import BGEM3QdrantSparse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXTS = ["free and equal", "", "什么是稠密向量?", "reason and conscience " * 9, 'dignity\n"\\']
LONG = "free " * 600


@pytest.fixture(scope="module", params=["http", "unix"])
def base_url(
    request: pytest.FixtureRequest, tiny: BGEM3Embeddings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    uds = tmp_path_factory.mktemp("socket") / "bge.sock" if request.param == "unix" else None
    with served(tiny, uds=uds) as url:
        yield url


@pytest.fixture
def remote(base_url: str) -> BGEM3Embeddings:
    return BGEM3Embeddings(base_url=base_url)


def told(embeddings: BGEM3Embeddings, **fields: Any) -> BGEM3Embeddings:
    return BGEM3Embeddings(**{**embeddings.model_dump(), **fields})


FIELDS = [
    {},
    {"query_instruction": "find: ", "document_instruction": "text: "},
    {"normalize": False, "max_length": 12, "on_truncate": "ignore"},
]


@pytest.mark.parametrize("fields", FIELDS)
async def test_every_method_gives_the_same_to_the_last_bit(
    remote: BGEM3Embeddings, tiny: BGEM3Embeddings, fields: dict[str, Any]
) -> None:
    there, here = told(remote, **fields), told(tiny, **fields)
    assert there.fingerprint == here.fingerprint
    assert there.dimension == here.dimension
    assert there.embed_documents(TEXTS) == here.embed_documents(TEXTS)
    assert there.embed_query(TEXTS[2]) == here.embed_query(TEXTS[2])
    assert await there.aembed_documents(TEXTS) == here.embed_documents(TEXTS)
    assert await there.aembed_query(TEXTS[2]) == here.embed_query(TEXTS[2])
    assert np.array_equal(list(there.embed_stream(iter(TEXTS))), list(here.embed_stream(TEXTS)))
    found, expected = (e.encode(TEXTS, lexical=True, colbert=True) for e in (there, here))
    assert np.array_equal(found.dense, expected.dense)
    assert found.lexical == expected.lexical
    assert [list(row) for row in found.lexical] == [list(row) for row in expected.lexical]
    for ours, theirs in zip(found.colbert, expected.colbert, strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(found.token_counts, expected.token_counts)
    assert np.array_equal(found.truncated, expected.truncated)
    assert [tensor.dtype for tensor in (found.dense, found.colbert[0])] == [np.float32] * 2
    assert found.dense.flags.writeable


def test_tokens_are_the_same(remote: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
    [weights] = tiny.encode([TEXTS[3]], dense=False, lexical=True).lexical
    assert list(remote.tokens(weights).items()) == list(tiny.tokens(weights).items())
    assert [remote.count_tokens(t) for t in TEXTS] == [tiny.count_tokens(t) for t in TEXTS]
    assert find_matches(remote, "equal", TEXTS) == find_matches(tiny, "equal", TEXTS)


def test_nothing_in_gives_nothing_in_the_same_shapes(remote: BGEM3Embeddings) -> None:
    encoding = remote.encode([], lexical=True, colbert=True)
    assert encoding.dense.shape == (0, 32)
    assert encoding.lexical == encoding.colbert == []
    assert encoding.token_counts.shape == encoding.truncated.shape == (0,)
    assert remote.embed_documents([]) == []


def test_a_reranker_orders_the_same(remote: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
    documents = [Document(text) for text in TEXTS]
    there, here = (
        BGEM3Reranker(embeddings=embeddings).compress_documents(documents, "equal")
        for embeddings in (remote, tiny)
    )
    assert there == here


BAD = [
    ["a", None],
    ["a", "b\ud800c"],
    "abc",
    7,
    ["a"] * 300 + [LONG],
    ["a"] * 300 + [b"bytes"],
]


@pytest.mark.parametrize("bad", BAD)
async def test_errors_are_the_same(
    remote: BGEM3Embeddings, tiny: BGEM3Embeddings, bad: Any
) -> None:
    there, here = (told(e, on_truncate="raise", max_length=20) for e in (remote, tiny))
    for method in ("embed_documents", "encode"):
        if isinstance(bad, int) and method == "embed_documents":
            continue
        expected = error_of(lambda m=method: getattr(here, m)(bad))
        assert error_of(lambda m=method: getattr(there, m)(bad)) == expected
    if isinstance(bad, list):
        assert error_of(lambda: list(there.embed_stream(bad))) == expected
        with pytest.raises(expected[0]) as caught:
            await there.aembed_documents(bad)
        assert str(caught.value) == expected[1]


def error_of(call: Any) -> tuple[type[BaseException], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return caught.type, str(caught.value)


def test_wrong_settings_are_the_same_errors(remote: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
    for call in (
        lambda e: told(e, max_length=8_192).load(),
        lambda e: e.encode(["free"], dense=False),
        lambda e: e.count_tokens(None),
    ):
        assert error_of(lambda c=call: c(remote)) == error_of(lambda c=call: c(tiny))


def test_a_cut_is_warned_of_at_the_callers_line(
    remote: BGEM3Embeddings, tiny: BGEM3Embeddings
) -> None:
    passages = ["a"] * 300 + [LONG]
    for method in ("embed_documents", "encode"):
        said = []
        for embeddings in (tiny, remote):
            with pytest.warns(UserWarning, match="cut: 300 ") as seen:
                getattr(embeddings, method)(passages)
            said.append([(str(w.message), w.filename) for w in seen])
        assert said[0] == said[1]
        assert said[0][0][1] == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told(remote, on_truncate="ignore").embed_query(LONG)


def test_a_bar_shows_what_has_come(
    remote: BGEM3Embeddings, capsys: pytest.CaptureFixture[str]
) -> None:
    told(remote, show_progress=True).embed_documents(["free"] * 600)
    assert "600/600" in capsys.readouterr().err


def test_a_hybrid_store_asks_once_for_both_sides(tiny: BGEM3Embeddings) -> None:
    with served(tiny) as url, gated(tiny) as gate:
        embeddings = BGEM3Embeddings(base_url=url)
        sparse = BGEM3QdrantSparse(embeddings)
        dense = embeddings.embed_documents(TEXTS)
        found = sparse.embed_documents(TEXTS)
        weights = [dict(zip(each.indices, each.values, strict=True)) for each in found]
        assert sum(gate.batches) == len(TEXTS)
    assert dense == tiny.embed_documents(TEXTS)
    assert weights == tiny.encode(TEXTS, dense=False, lexical=True).lexical


def test_such_a_process_imports_no_torch(base_url: str, tmp_path: Path) -> None:
    code = f"""
        import sys
        from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
        from langchain_bge_dense.chroma import index_documents, open_chroma
        from langchain_core.documents import Document
        embeddings = BGEM3Embeddings(base_url={base_url!r})
        embeddings.embed_documents(["free", "equal"])
        store = open_chroma(
            embeddings, "rights", persist_directory={str(tmp_path)!r}, lexical=True
        )
        index_documents(store, [Document("free and equal"), Document("a brown fox")])
        assert embeddings.fingerprint in str(store._collection.metadata)
        [found] = BGEM3Retriever(vectorstore=store, k=1).invoke("a brown fox")
        print(found.page_content)
        store.close()
        heavy = {{"torch", "transformers", "FlagEmbedding", "tokenizers"}}
        print(*sorted(heavy & {{*sys.modules}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["a brown fox", ""]


class TestManyCallers:
    def test_threads(self, remote: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
        passages = texts(200)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(remote.embed_query, passages))
        assert alike(found, tiny.embed_documents(passages))

    async def test_coroutines(self, remote: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
        passages = texts(200)
        found = await asyncio.gather(*map(remote.aembed_query, passages))
        assert alike(found, tiny.embed_documents(passages))

    def test_event_loops_one_after_the_other(self, remote: BGEM3Embeddings) -> None:
        first = asyncio.run(remote.aembed_query("free"))
        assert asyncio.run(remote.aembed_query("free")) == first == remote.embed_query("free")

    def test_equal_settings_share_their_connections(self, remote: BGEM3Embeddings) -> None:
        twin = told(remote, query_instruction="find: ")
        assert twin.load()._engine is remote.load()._engine
        remote.close()
        assert len(remote.embed_query("free")) == 32

    def test_a_pickle(self, remote: BGEM3Embeddings) -> None:
        expected = remote.embed_query("free")
        assert pickle.loads(pickle.dumps(remote)).embed_query("free") == expected  # noqa: S301

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_forked_children(self, base_url: str) -> None:
        code = f"""
            import os, sys, threading
            from langchain_bge_dense import BGEM3Embeddings
            embeddings = BGEM3Embeddings(base_url={base_url!r})
            expected = embeddings.embed_query("free")
            def ask(): [embeddings.embed_query("free") for _ in range(20)]
            def wrong():  # queries that wait together share a batch, which may change a last digit
                pairs = zip(embeddings.embed_query("free"), expected, strict=True)
                return max(abs(now - before) for now, before in pairs) > 1e-6
            busy = threading.Thread(target=ask)
            busy.start()
            for _ in range(3):
                if not (pid := os.fork()):
                    os._exit(wrong())
                assert os.waitpid(pid, 0)[1] == 0
            busy.join()
            assert not wrong()
        """
        forks = "ignore::DeprecationWarning"  # Python 3.12 warns of a fork beside threads
        done = subprocess.run(
            [sys.executable, "-W", forks, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=True,
            timeout=WAIT * 3,
        )
        assert done.stderr == ""

    def test_a_spawned_process(self, remote: BGEM3Embeddings) -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(remote.embed_query, ["free"]) == remote.embed_query("free")


class TestHangingUp:
    @pytest.mark.parametrize("count", [1, 1_000])
    async def test_a_cancelled_call_drops_its_texts_on_the_server(
        self, tiny: BGEM3Embeddings, remote: BGEM3Embeddings, count: int
    ) -> None:
        remote.load()
        with gated(tiny) as gate:
            gate.go_on.clear()
            running = asyncio.create_task(remote.aembed_query("the one that runs"))
            await asyncio.to_thread(gate.entered.wait, WAIT)
            gone = asyncio.create_task(remote.aembed_documents(texts(count)))
            await asyncio.sleep(0.2)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            await asyncio.sleep(0.2)
            gate.go_on.set()
            await running
            await remote.aembed_documents(["the next one"])
            assert gate.batches == [1, 1]

    def test_a_stream_that_is_left_early_drops_the_rest(
        self, tiny: BGEM3Embeddings, remote: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Client, "window", 1_500)
        with gated(tiny) as gate:
            stream = remote.embed_stream(iter(texts(6_000)))
            assert len(list(islice(stream, 1_501))) == 1_501  # so that the third window runs
            gate.go_on.clear()
            gate.entered.clear()
            assert gate.entered.wait(WAIT)
            stream.close()
            threading.Event().wait(0.2)
            gate.go_on.set()
            ran = sum(gate.batches)
            remote.embed_query("free")
            remote.embed_documents(["free"])
            assert sum(gate.batches) == ran + 2


class TestServersWays:
    """What a server answers that is not a result."""

    def test_small_limits_only_make_more_requests(self, tiny: BGEM3Embeddings) -> None:
        passages = texts(100)
        strict = {"on_truncate": "raise", "max_length": 120}
        with served(tiny, max_texts=64, max_body=3_000) as url:
            embeddings = BGEM3Embeddings(base_url=url, **strict)
            assert alike(embeddings.embed_documents(passages), tiny.embed_documents(passages))
            vectors = embeddings.encode(passages, dense=False, colbert=True).colbert
            assert len(vectors) == 100
            bad = [*passages, LONG[:1_000]]
            assert error_of(lambda: embeddings.embed_documents(bad)) == error_of(
                lambda: told(tiny, **strict).embed_documents(bad)
            )
            with pytest.raises(ValueError, match=r"larger than the 3,000 bytes"):
                embeddings.embed_query("free " * 1_000)

    def test_a_key(self, tiny: BGEM3Embeddings) -> None:
        with served(tiny, api_key="correct") as url:
            right = BGEM3Embeddings(base_url=url, api_key="correct")
            assert right.embed_query("free") == tiny.embed_query("free")
            assert "correct" not in repr(right)
            for key in ("another", None):
                with pytest.raises(PermissionError, match="Missing or invalid API key"):
                    BGEM3Embeddings(base_url=url, api_key=key).embed_query("free")

    def test_a_full_queue(self, tiny: BGEM3Embeddings) -> None:
        with served(tiny, max_queue=1) as url, gated(tiny) as gate, ThreadPoolExecutor(1) as pool:
            embeddings = BGEM3Embeddings(base_url=url).load()
            gate.go_on.clear()
            running = pool.submit(embeddings.embed_query, "free")
            assert gate.entered.wait(WAIT)
            with pytest.raises(ConnectionError, match="The queue is full: 1 requests wait"):
                embeddings.embed_query("equal")
            gate.go_on.set()
            assert running.result(WAIT) == tiny.embed_query("free")

    @pytest.mark.parametrize(
        ("status", "answer"),
        [
            (404, "no such page"),
            (404, '{"error": {"type": "NotFound", "message": "Not Found"}}'),
            (200, "<html>a page</html>"),
            (200, '{"model_id": "BAAI/bge-m3", "version": "1.8"}'),
            (200, "[]"),
        ],
    )
    def test_another_server(self, status: int, answer: str) -> None:
        class Other(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *args: object) -> None:
                pass

        with HTTPServer((HOST, 0), Other) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://{HOST}:{server.server_port}"
            words = f"{url} is not a server of langchain_bge_dense.serve: it answered {status} "
            with pytest.raises(RuntimeError, match=f"{words}.*{re.escape(answer[:9])}.*base_url"):
                BGEM3Embeddings(base_url=url).load()
            server.shutdown()

    def test_chromas_server(self, tmp_path: Path) -> None:
        with ChromaServer(tmp_path) as server:
            embeddings = BGEM3Embeddings(base_url=f"http://{server.host}:{server.port}")
            with pytest.raises(
                RuntimeError, match=r"is not a server of langchain_bge_dense\.serve"
            ):
                embeddings.load()

    def test_another_path_of_ours(self, base_url: str) -> None:
        if base_url.startswith("http"):
            with pytest.raises(RuntimeError, match="/bge is not a server of langchain_bge_dense"):
                BGEM3Embeddings(base_url=f"{base_url}/bge").load()

    async def test_nobody(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(client, "_FIRST_SECONDS", 0.5)
        url = f"http://{HOST}:{free_port()}"
        embeddings = BGEM3Embeddings(base_url=url)
        for _ in range(2):
            with pytest.raises(
                ConnectionError, match=rf"{url} did not answer in \d attempts: ConnectError.*serve"
            ):
                await asyncio.gather(*(embeddings.aembed_query("free") for _ in range(3)))
        [line] = caplog.messages
        assert line.startswith(f"{url} does not answer, and is asked again for 0 s: ConnectError")

    def test_patience_is_for_those_that_have_answered(self, tiny: BGEM3Embeddings) -> None:
        with served(tiny) as url:
            engine = Client(url)
            assert engine._patience == 5
            assert engine.count_tokens("free") > 0
            assert engine._patience == 60

    def test_tls_with_a_server_that_has_none(self, base_url: str) -> None:
        if base_url.startswith("http"):
            url = base_url.replace("http", "https")
            with pytest.raises(
                ConnectionError, match=rf"{url} cannot be asked over TLS: .* http://"
            ):
                BGEM3Embeddings(base_url=url).load()

    def test_certificates_that_are_nowhere(
        self, remote: BGEM3Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", missing := str(tmp_path / "missing.pem"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Client(remote.base_url).count_tokens("free") > 0
        with pytest.raises(ConnectionError, match=rf"https://h by cannot be read.*'{missing}'"):
            BGEM3Embeddings(base_url="https://h").load()

    def test_another_model_than_before(
        self, tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with served(tiny) as url:
            embeddings = BGEM3Embeddings(base_url=url).load()
            object.__setattr__(embeddings._engine.checkpoint, "digest", "0123456789ab")
            with pytest.raises(ValueError, match=r"model has changed: its digest is .* not '0123"):
                embeddings.embed_query("free")
            embeddings.close()
            assert embeddings.embed_query("free") == tiny.embed_query("free")

    def test_it_is_killed_and_comes_back(
        self, tiny: BGEM3Embeddings, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        passages = texts(1_500)
        options = ("--model", str(tiny_checkpoint), "--dtype", "float32", "--device", "cpu")
        with ModelServer(tmp_path, *options) as server, ThreadPoolExecutor(8) as pool:
            embeddings = BGEM3Embeddings(base_url=server.base_url).load()
            bulk = pool.submit(embeddings.embed_documents, passages)
            queries = [pool.submit(embeddings.embed_query, text) for text in passages[:300]]
            queries[20].result(WAIT)
            server.kill()
            server.start()
            found = [query.result(3 * WAIT) for query in queries]
            assert alike(bulk.result(3 * WAIT), tiny.embed_documents(passages))
            assert alike(found, tiny.embed_documents(passages[:300]))


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"api_key": "k"}, "api_key is for a server. Give its base_url"),
            ({"base_url": "http://h", "model": "x"}, "model cannot be set for the model of the"),
            ({"base_url": "http://h", "dtype": "int8", "device": "cpu"}, "device, dtype cannot"),
            ({"base_url": "127.0.0.1:8000"}, r"base_url is '127.0.0.1:8000', .* Write http://host"),
            ({"base_url": "http://host:port"}, "base_url is 'http://host:port', which is not the"),
            ({"base_url": "http://"}, "base_url is 'http://', which is not the URL of a server"),
            ({"base_url": "unix://"}, "base_url is 'unix://', which is not the URL of a server"),
        ],
    )
    def test_what_cannot_be(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            BGEM3Embeddings(**fields)

    @pytest.mark.parametrize("url", ["http://h:80/v1", "http://h:80/v1/", "http://h:80/"])
    def test_the_url_of_openais_clients_is_taken(self, url: str) -> None:
        assert BGEM3Embeddings(base_url=url) == BGEM3Embeddings(base_url="http://h:80")
        socket = BGEM3Embeddings(base_url="unix:///run/v1")
        assert socket.base_url == "unix:///run/v1"

    def test_settings_survive_a_dump(self) -> None:
        embeddings = BGEM3Embeddings(base_url="http://h", api_key="k", max_length=12)
        assert told(embeddings) == embeddings


def test_the_end_of_a_client_closes_its_connections(tiny: BGEM3Embeddings) -> None:
    with served(tiny) as url:
        engine = Client(url)
        assert engine.count_tokens("free") > 0
        [http] = engine._https.values()
        del engine
        for _ in range(200):
            if http.is_closed:
                break
            threading.Event().wait(0.01)
        assert http.is_closed
