"""The one door to Chroma: any number of ids and bytes, servers away, folders replaced, filters."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import chromadb
import numpy as np
import pytest
from chroma_server import ChromaServer
from chromadb.config import Settings
from hashed_embeddings import HashedEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import plain
from langchain_core.documents import Document
from tenacity import stop_after_attempt, wait_fixed

from langchain_bge_dense import BGEM3Reranker, BGEM3Retriever
from langchain_bge_dense.chroma import (
    compact,
    folder,
    index_documents,
    index_vectors,
    open_chroma,
)
from langchain_bge_dense.chroma.session import RETRYING
from langchain_bge_dense.chroma.settings import fingerprint_of
from langchain_bge_dense.errors import AnotherModelError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ChromaServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def place(server) -> dict:
    return {"host": server.host, "port": server.port}


def filled(count: int, **options):
    """A store of so many passages, whose ids are their numbers."""
    embeddings = HashedEmbeddings(2)
    store = open_chroma(embeddings, **options)
    vectors = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
    rows = ((Document(str(n), id=str(n)), vector) for n, vector in enumerate(vectors))
    index_vectors(store, rows, fingerprint=fingerprint_of(embeddings), batch_size=5_000)
    return store


def test_more_ids_than_sqlite_takes(tmp_path):
    quick = {"hnsw": {"max_neighbors": 4, "ef_construction": 8, "ef_search": 8}}
    store = filled(33_000, persist_directory=tmp_path, collection_configuration=quick)
    ids = [str(number) for number in range(33_000)]
    assert len(store.get_by_ids(ids)) == 33_000
    part = store.get(ids=[*ids, "unknown"], limit=3, offset=20_000, include=["embeddings"])
    assert len(part["ids"]) == len(part["embeddings"]) == 3
    store.update_documents(ids, [Document("7", id="7"), *([Document("x")] * 32_999)][:33_000])
    store.delete(ids[1:])
    assert store.get()["ids"] == ["0"]
    store.close()


class TestServer:
    """Bodies of any size, and a server that goes away."""

    def documents(self, count: int, size: int) -> list[Document]:
        return [Document(f"{n} " + "x" * size, id=str(n)) for n in range(count)]

    def test_more_bytes_than_it_takes(self, place):
        store = open_chroma(HashedEmbeddings(), "bytes", **place)
        documents = self.documents(50, 1 << 20)
        assert index_documents(store, documents).added == 50
        store.delete(["1"])
        assert compact(store).passages == 49
        assert index_documents(store, documents).added == 1

    def test_a_text_that_is_too_large_is_named(self, place):
        store = open_chroma(HashedEmbeddings(), "large", **place)
        with pytest.raises(ValueError, match=r"Document '0' takes 42.0 MiB, .* Split its text"):
            index_documents(store, self.documents(1, 42 << 20))

    # Chroma leaves the connection of a client that it could not make to the garbage collector.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
    @pytest.mark.parametrize("missing", ["tenant", "database"])
    def test_a_tenant_or_database_that_is_missing_is_named(self, place, missing, tmp_path):
        for where in (place, {"persist_directory": tmp_path}):
            with pytest.raises(ValueError, match=f"does not have the {missing} 'nowhere'"):
                open_chroma(HashedEmbeddings(), **where, **{missing: "nowhere"})
        gc.collect()

    def test_no_server(self):
        with pytest.raises(ConnectionError, match=r"at 127.0.0.1 does not answer. Start it"):
            open_chroma(HashedEmbeddings(), host="127.0.0.1", port=9)

    def test_every_read_waits_for_it(self, server, place, tiny, monkeypatch):
        monkeypatch.setattr(RETRYING, "wait", wait_fixed(0.1))
        store = open_chroma(tiny, "away", lexical=True, colbert=True, **place)
        documents = [Document("equal rights", id="a"), Document("free and equal", id="b")]
        index_documents(store, documents)
        retriever = BGEM3Retriever(vectorstore=store)
        reranker = BGEM3Reranker(vectorstore=store)
        for call in (
            lambda: retriever.invoke("equal"),
            lambda: reranker.compress_documents(documents, "equal"),
            lambda: store.similarity_search("equal"),
            lambda: store.get()["ids"],
            lambda: [index_documents(store, documents).skipped] * 2,
        ):
            server.stop()
            starting = threading.Timer(0.5, server.start)
            starting.start()
            assert len(call()) == 2
            starting.join()

    def test_a_read_says_that_it_stays_away(self, server, place, monkeypatch):
        monkeypatch.setattr(RETRYING, "wait", wait_fixed(0.01))
        monkeypatch.setattr(RETRYING, "stop", stop_after_attempt(2))
        store = open_chroma(HashedEmbeddings(), "gone", **place)
        server.stop()
        with pytest.raises(ConnectionError, match="did not answer in 2 attempts"):
            store.similarity_search("one")
        server.start()


class TestFolderThatChanges:
    """A folder that is removed, emptied or replaced while a store of this process is open."""

    @pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
    @pytest.mark.parametrize("lexical", [False, True])
    def test_is_opened_again_as_it_is(self, tmp_path, tiny, how, lexical):
        folder, other = tmp_path / "db", tmp_path / "other"
        with open_chroma(tiny, persist_directory=other, lexical=lexical) as store:
            store.add_texts(["another text"], ids=["other"])
        former = open_chroma(tiny, persist_directory=folder, lexical=lexical)
        former.add_texts(["one", "two"], ids=["1", "2"])
        if how == "emptied":
            for each in folder.iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        else:
            shutil.rmtree(folder)
        if how == "replaced":
            shutil.copytree(other, folder)
        store = open_chroma(tiny, persist_directory=folder, lexical=lexical)
        assert store.get()["ids"] == (["other"] if how == "replaced" else [])
        store.add_texts(["three"], ids=["3"])
        found = BGEM3Retriever(vectorstore=store, k=9).invoke("three") if lexical else ()
        assert {d.id for d in found} == (set(store.get()["ids"]) if lexical else set())
        assert former.get()["ids"] == store.get()["ids"]
        store.close()

    def test_another_process_may_write_to_it(self, tmp_path):
        folder = tmp_path / "db"
        former = open_chroma(HashedEmbeddings(), persist_directory=folder)
        former.add_texts(["one"])
        shutil.rmtree(folder)
        code = (
            "import sys; from hashed_embeddings import HashedEmbeddings\n"
            "from langchain_bge_dense.chroma import open_chroma\n"
            "store = open_chroma(HashedEmbeddings(), persist_directory=sys.argv[1])\n"
            "store.add_texts(['from elsewhere'])"
        )
        subprocess.run(
            [sys.executable, "-c", code, folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        store = open_chroma(HashedEmbeddings(), persist_directory=folder)
        assert store.get()["documents"] == ["from elsewhere"]
        store.add_texts(["two"])
        assert len(store.similarity_search("two")) == 2


PLAIN = """
import sys, chromadb
from chromadb.config import Settings
from hashed_embeddings import HashedEmbeddings
from langchain_bge_dense.chroma import open_chroma
folder, other = sys.argv[1:3]
for round in range(2):
    memory = chromadb.EphemeralClient()
    before = chromadb.PersistentClient(other)
    own = chromadb.PersistentClient(f"{folder}-own", Settings(allow_reset=True))
    open_chroma(HashedEmbeddings()).add_texts(["one"])
    open_chroma(HashedEmbeddings(), persist_directory=folder).add_texts(["one"])
    open_chroma(HashedEmbeddings(), persist_directory=other).add_texts(["one"])
    open_chroma(HashedEmbeddings(), persist_directory=f"{folder}-own").add_texts(["one"])
    chromadb.EphemeralClient().list_collections()
    chromadb.PersistentClient(other).list_collections()
    chromadb.PersistentClient(folder).list_collections()
"""


@pytest.mark.parametrize("telemetry", [None, "True", "False"])
def test_plain_clients_of_the_process_go_on(tmp_path, telemetry):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ANONYMIZED_TELEMETRY", None)
    if telemetry is not None:
        environment["ANONYMIZED_TELEMETRY"] = telemetry
    command = [sys.executable, "-c", PLAIN, tmp_path / "db", tmp_path / "other"]
    subprocess.run(command, env=environment, check=True)


TELEMETRY = """
import sys
from chromadb.telemetry.product import ProductTelemetryClient
from overrides import override
class Told(ProductTelemetryClient):
    def __init__(self, system):
        super().__init__(system)
        print(system.settings.anonymized_telemetry)
    @override
    def capture(self, event):
        pass
sys.modules["told"] = sys.modules["__main__"]
from hashed_embeddings import HashedEmbeddings
from langchain_bge_dense.chroma import open_chroma
open_chroma(HashedEmbeddings())
open_chroma(HashedEmbeddings(), persist_directory=sys.argv[1])
"""


def test_telemetry_is_off_where_a_store_starts_chroma(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {
        "CHROMA_PRODUCT_TELEMETRY_IMPL": "told.Told",
        "CHROMA_TELEMETRY_IMPL": "told.Told",
        "ANONYMIZED_TELEMETRY": "True",
    }
    command = [sys.executable, "-c", TELEMETRY, tmp_path]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False", "False"]


NUMBERS = [-3, -2, -1, 0, 1, 2, 3, -2.5, -2.0, 0.5, 2.5, 2.0, 2.7]
BOUNDS = st.sampled_from([-3.5, -2.5, -2.0, -0.5, 0.0, 0.5, 2.0, 2.5, 2.7, -2, 0, 3])
OPERATORS = {
    "$gt": lambda one, other: one > other,
    "$gte": lambda one, other: one >= other,
    "$lt": lambda one, other: one < other,
    "$lte": lambda one, other: one <= other,
    "$eq": lambda one, other: one == other,
    "$ne": lambda one, other: one != other,
    "$in": lambda one, other: one in other,
    "$nin": lambda one, other: one not in other,
}
SINGLE = st.tuples(st.sampled_from(list(OPERATORS)[:6]), BOUNDS)
LISTS = st.lists(BOUNDS.filter(lambda bound: isinstance(bound, float)), min_size=1, max_size=3)
SEVERAL = st.tuples(st.sampled_from(["$in", "$nin"]), LISTS)


@pytest.fixture(scope="module")
def numbers():
    store = open_chroma(HashedEmbeddings())
    documents = [Document(str(n), metadata={"n": n}) for n in NUMBERS]
    store.add_documents(documents)
    return store


@settings(deadline=None, max_examples=80)
@given(condition=SINGLE | SEVERAL, joint=st.sampled_from([None, "$and", "$or"]))
def test_bounds_of_filters_mean_what_they_say(numbers, condition, joint):
    operator, bound = condition
    where = {"n": {operator: bound}}
    if joint:
        where = {joint: [where, {"n": {"$lt": 100}} if joint == "$and" else {"n": {"$gt": 100}}]}
    expected = sorted(str(n) for n in NUMBERS if OPERATORS[operator](n, bound))
    assert sorted(numbers.get(where=where)["documents"]) == expected
    found = numbers.similarity_search("1", k=50, filter=where)
    assert sorted(d.page_content for d in found) == expected


def test_a_fraction_without_an_operator_and_empty_filters(numbers):
    assert numbers.get(where={"n": 2.5})["documents"] == ["2.5"]
    assert len(numbers.similarity_search("1", k=50, filter={})) == len(NUMBERS)
    assert len(numbers.get(where={})["ids"]) == len(NUMBERS)
    for nothing in ({"where": {}}, {"where_document": {}}, {}):
        with pytest.raises(ValueError, match="needs a selection"):
            numbers.delete(**nothing)


def test_a_fraction_deletes_what_it_means():
    store = open_chroma(HashedEmbeddings())
    store.add_texts(["two", "three"], [{"n": 2}, {"n": 3}])
    store.delete(where={"n": {"$gte": 2.5}})
    assert store.get()["documents"] == ["two"]
    store.delete(where={"n": {"$lt": 1.5}})
    assert store.get()["documents"] == ["two"]


def test_a_vector_without_a_text_is_no_passage():
    store = open_chroma(HashedEmbeddings())
    store.add_texts(["one"], ids=["1"])
    plain(store).add(ids=["bare"], embeddings=[store.embeddings.embed_query("bare")])
    assert [d.id for d in store.similarity_search("bare", k=5)] == ["1"]


def test_a_folder_that_is_read_again_and_again_takes_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_COLLECTING_SECONDS", 0.0)
    with open_chroma(HashedEmbeddings(), persist_directory=tmp_path) as store:
        store.add_texts(["one"])
        session = store.passages.session
        former = weakref.ref(session.client._system)
        gc.disable()  # nobody knows when it would run
        try:
            for _ in range(3):
                session.reopen()
                assert store.similarity_search("one")
            assert former() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("k", [0, -1])
def test_no_documents_cannot_be_asked_for(k):
    store = open_chroma(HashedEmbeddings())
    store.add_texts(["one", "two"])
    with pytest.raises(TypeError, match=f"{k}, cannot be negative, or zero"):
        store.similarity_search("one", k=k)


class TestEqualPassages:
    """Page headers, blank pages and licence texts, which are equal vectors in Chroma's graph."""

    def filled(self, **configuration):
        embeddings = HashedEmbeddings(64)
        options = {"collection_configuration": {"hnsw": configuration}} if configuration else {}
        store = open_chroma(embeddings, **options)
        chooser = np.random.default_rng(1)
        same = chooser.standard_normal(64)
        vectors = [same] * 300 + [*chooser.standard_normal((300, 64))]
        rows = [(Document(str(n), id=str(n)), v) for n, v in enumerate(vectors)]
        chooser.shuffle(rows)
        index_vectors(store, rows, fingerprint=fingerprint_of(embeddings))
        return store, np.array(vectors)

    def test_hide_no_others(self):
        store, vectors = self.filled()
        found = store.similarity_search_by_vector(vectors[300].tolist(), k=600)
        assert len({d.id for d in found}) == 600
        for number in range(300, 600):
            [first] = store.similarity_search_by_vector(vectors[number].tolist(), k=1)
            assert first.id == str(number)

    @pytest.mark.parametrize("written_by", ["store", "plain Chroma"])
    def test_more_than_a_search_keeps_in_view_hide_few_others(self, written_by):
        store = open_chroma(HashedEmbeddings(64))
        chooser = np.random.default_rng(1)
        same = chooser.standard_normal(64)
        topics = 0.5 * same + chooser.standard_normal((50, 64))
        others = np.repeat(topics, 10, axis=0) + 0.5 * chooser.standard_normal((500, 64))
        vectors = np.float32([*[same] * 2_000, *others])
        order = chooser.permutation(len(vectors))
        texts = list(map(str, order))
        collection = store.passages.collection if written_by == "store" else plain(store)
        collection.upsert(
            ids=texts, embeddings=vectors[order], documents=texts, metadatas=[None] * len(order)
        )
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        hits = 0
        for number in range(2_000, 2_500):
            found = store.similarity_search_by_vector(vectors[number].tolist(), k=4)
            cosines = unit @ unit[number]
            hits += sum(cosines[[int(d.id) for d in found]] >= np.sort(cosines)[-4] - 1e-5)
        assert hits / (4 * 500) >= 0.99

    def test_an_answer_is_completed_in_order_where_the_graph_has_no_way(self):
        store, vectors = self.filled(max_neighbors=4, ef_construction=8, ef_search=8)
        asked = vectors[300]
        found = store.similarity_search_by_vector_with_relevance_scores(asked.tolist(), k=600)
        distances = [distance for _, distance in found]
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = np.sort(1 - unit @ unit[300])
        np.testing.assert_allclose(distances, expected, atol=1e-5)
        some = {"where_document": {"$contains": "9"}}
        expected = {str(n) for n in range(600) if "9" in str(n)}
        found = store.similarity_search_by_vector(asked.tolist(), k=600, **some)
        assert {d.id for d in found} == expected
        pairs = store.similarity_search_with_vectors("1", k=600)
        assert len(pairs) == 600
        for document, vector in pairs[-50:]:
            np.testing.assert_allclose(vector, vectors[int(document.id)], atol=1e-5)


def test_a_folder_that_may_not_be_written_to(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(PermissionError, match=r"may not be written to: .* take another folder"):
        open_chroma(HashedEmbeddings(), persist_directory=tmp_path / "file" / "db")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may take another user's place")
def test_a_folder_of_another_user():
    folder = Path("/var/tmp") / f"read-only-{os.getpid()}"  # noqa: S108 - others may enter it
    code = (
        "import os, sys; from hashed_embeddings import HashedEmbeddings\n"
        "from langchain_bge_dense.chroma import open_chroma\n"
        "os.setuid(65534)\n"
        "open_chroma(HashedEmbeddings(), persist_directory=sys.argv[1])"
    )
    with open_chroma(HashedEmbeddings(), persist_directory=folder) as store:
        store.add_texts(["one"])
    folder.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError: '/var/tmp/read-only-" in done.stderr
        assert "Give this process the right" in done.stderr
    finally:
        shutil.rmtree(folder)


def test_clients_of_other_kinds(tmp_path):
    asynchronous = chromadb.AsyncHttpClient()
    with pytest.raises(TypeError, match=r"client is coroutine. Pass a synchronous client"):
        open_chroma(HashedEmbeddings(), client=asynchronous)
    asynchronous.close()
    given = Settings(is_persistent=True, persist_directory=str(tmp_path), allow_reset=True)
    store = open_chroma(HashedEmbeddings(), client_settings=given)
    store.add_texts(["one"])
    assert (tmp_path / "chroma.sqlite3").exists()


def test_a_collection_that_another_model_fills_anew_is_refused():
    client = chromadb.EphemeralClient()
    store = open_chroma(HashedEmbeddings(), "anew", client=client)
    store.add_texts(["one"])
    client.delete_collection("anew")
    with pytest.raises(ValueError, match="'anew' was deleted"):
        store.get()
    open_chroma(HashedEmbeddings(model="other"), "anew", client=client).add_texts(["two"])
    for _ in range(2):
        with pytest.raises(AnotherModelError, match="holds vectors of"):
            index_documents(store, [Document("three")])
        with pytest.raises(AnotherModelError, match="holds vectors of"):
            store.similarity_search("two")
