"""`open_chroma` and `index_documents` against a real Chroma server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chroma_server import ChromaServer
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document
from tenacity import stop_after_attempt, wait_fixed

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.chroma import compact, index_documents, open_chroma, session

SCRIPT = Path(__file__).parents[1] / "indexing_process.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ChromaServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def place(server) -> dict:
    return {"host": server.host, "port": server.port}


def passages(count: int) -> list[Document]:
    return [Document(f"passage {i}", metadata={"number": i, "tags": ["a"]}) for i in range(count)]


def test_round_trip(place):
    store = open_chroma(HashedEmbeddings(), "round", collection_metadata={"owner": "me"}, **place)
    assert index_documents(store, [*passages(5), Document("bare")], batch_size=2).added == 6
    again = open_chroma(HashedEmbeddings(), "round", **place)
    assert again._collection.metadata["owner"] == "me"
    assert not again._client.get_settings().anonymized_telemetry
    found = {d.page_content: d.metadata for d in again.similarity_search("passage 1", k=6)}
    assert next(iter(found)) == "passage 1"
    assert found["passage 3"] == {"number": 3, "tags": ["a"]}
    assert found["bare"] == {}
    assert index_documents(again, passages(6)).skipped == 5


def test_stores_of_others_follow_a_compaction(place, tiny):
    store, other = (
        open_chroma(tiny, "followed", lexical=True, colbert=True, **place) for _ in range(2)
    )
    store.add_texts(["part one", "part two"], ids=["1", "2"])
    retriever = BGEM3Retriever(vectorstore=other, k=5)
    calls = [
        lambda: other.similarity_search("part"),
        lambda: retriever.invoke("part"),
        lambda: other.get()["ids"],
        lambda: other.get_by_ids(["1", "2"]),
        lambda: other.add_texts(["part two", "part three"], ids=["2", "3"]),
        lambda: other.update_documents(["3"], [Document("part four")]) or [1, 2],
        lambda: other.delete(["3"]) or [1, 2],
        lambda: retriever.invoke("part"),
    ]
    for call in calls:
        compact(store)
        assert len(call()) == 2
    assert sorted(store.get()["documents"]) == ["part one", "part two"]


def test_other_embeddings_are_refused(place):
    open_chroma(HashedEmbeddings(), "refused", **place)
    with pytest.raises(ValueError, match="holds vectors of"):
        open_chroma(HashedEmbeddings(model="other"), "refused", **place)
    with pytest.raises(ValueError, match="vectors of 8 numbers"):
        open_chroma(HashedEmbeddings(16), "refused", **place)


def test_opened_by_two_models_at_once(place):
    barrier = threading.Barrier(8)

    def opened(caller: int) -> str | None:
        embeddings = HashedEmbeddings(model=f"model {caller % 2}")
        barrier.wait()
        try:
            open_chroma(embeddings, "race", **place)
        except ValueError:
            return None
        return embeddings.model

    with ThreadPoolExecutor(8) as callers:
        models = list(callers.map(opened, range(8)))
    assert len(set(models) - {None}) == 1
    assert models.count(None) == 4


def test_two_processes_at_once(place):
    command = [sys.executable, str(SCRIPT), json.dumps(place)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parts = (["300"], ["400", "from=100"])
    processes = [
        subprocess.Popen([*command, *part], stdout=subprocess.DEVNULL, env=environment)
        for part in parts
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    store = open_chroma(HashedEmbeddings(), "passages", **place)
    assert sorted(m["number"] for m in store.get()["metadatas"]) == list(range(400))


def test_the_server_stops_and_comes_back(server, place, monkeypatch, caplog):
    monkeypatch.setattr(session.RETRYING, "wait", wait_fixed(0.1))
    embeddings = HashedEmbeddings()
    store = open_chroma(embeddings, "back", **place)

    def disturbed():
        for number, document in enumerate(passages(300)):
            if number == 150:
                server.stop()
                threading.Timer(0.5, server.start).start()
            yield document

    assert index_documents(store, disturbed(), batch_size=40).added == 300
    assert embeddings.embedded == 300
    assert len(store.similarity_search("passage 1", k=300)) == 300
    assert "Retrying" in caplog.text


def test_the_server_stays_away(server, place, monkeypatch):
    monkeypatch.setattr(session.RETRYING, "wait", wait_fixed(0.01))
    monkeypatch.setattr(session.RETRYING, "stop", stop_after_attempt(3))
    store = open_chroma(HashedEmbeddings(), "away", **place)

    def disturbed():
        yield from passages(100)
        server.stop()
        yield from passages(200)[100:]

    with pytest.raises(
        ConnectionError, match=r"did not answer in 3 attempts.* Start it and run this again"
    ):
        index_documents(store, disturbed(), batch_size=40)
    server.start()
    done = index_documents(store, passages(200), batch_size=40)
    assert (done.added, done.skipped) == (120, 80)
