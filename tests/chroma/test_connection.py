"""Several processes, threads and stores on one folder; closing; forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromadb.api.models.Collection import Collection
from chromadb.errors import InternalError
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Reranker, BGEM3Retriever
from langchain_bge_dense.chroma import compact, folder, index_documents, open_chroma, session

if TYPE_CHECKING:
    from typing_extensions import Self

WRITER = """
import sys
from langchain_core.documents import Document
from typing_extensions import Self
from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import compact, index_documents, open_chroma
model = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype="float32")
store = open_chroma(model, "notes", persist_directory=sys.argv[2], lexical=True)
print("open", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Writer:
    """A process with the store of `WRITER`, which runs lines of Python."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, checkpoint, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "open\n"

    def run(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def _at_once(monkeypatch):
    monkeypatch.setattr(folder, "_STALE_SECONDS", 0.0)
    monkeypatch.setattr(folder, "_REOPENING_SHARE", 1e9)


@pytest.mark.usefixtures("_at_once")
def test_a_reader_sees_what_another_process_writes(tiny, tiny_checkpoint, tmp_path):
    with Writer(tiny_checkpoint, tmp_path) as writer:
        writer.run("store.add_texts(['part one'], ids=['1'])")
        store = open_chroma(tiny, "notes", persist_directory=tmp_path)
        retriever = BGEM3Retriever(vectorstore=store, k=100)
        assert [d.id for d in retriever.invoke("part")] == ["1"]
        writer.run(
            "store.add_texts([f'part {n}' for n in range(20)], ids=list(map(str, range(20))))"
        )
        assert len(retriever.invoke("part")) == 20
        # Once in a hundred times Chroma's graph of 20 vectors has no way to one of them.
        assert len(store.similarity_search("part", k=100)) >= 18
        assert len(store.get(include=["embeddings"])["embeddings"]) == 20
        writer.run("store.delete(list(map(str, range(15))))")
        assert len(store.similarity_search("part", k=3)) == 3
        assert {d.id for d in retriever.invoke("part")} == set(map(str, range(15, 20)))
        writer.run("compact(store)")
        assert {d.id for d in retriever.invoke("part")} == set(map(str, range(15, 20)))
        writer.run("store.add_texts(['part x'], ids=['x'])")
        assert "x" in {d.id for d in retriever.invoke("part x")}
        with pytest.raises(RuntimeError, match="Another process has indexed"):
            store.add_texts(["mine"])
        opened = store.passages.session.epoch
        assert len(retriever.invoke("part x")) == 6
        assert store.passages.session.epoch == opened  # nothing new was to be read
        writer.run("store.close()")
        store.add_texts(["mine"])
        assert len(store.similarity_search("part", k=100)) == 7


def test_a_reader_that_may_not_open_again_yet_gives_whole_documents(
    tiny, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(folder, "_STALE_SECONDS", 60.0)
    with Writer(tiny_checkpoint, tmp_path) as writer:
        writer.run(
            "store.add_texts([f'part {n}' for n in range(20)], ids=list(map(str, range(20))))"
        )
        store = open_chroma(tiny, "notes", persist_directory=tmp_path)
        retriever = BGEM3Retriever(vectorstore=store, k=100)
        writer.run("store.delete(list(map(str, range(10))))")
        found = [*store.similarity_search("part", k=20), *retriever.invoke("part")]
        assert {d.id for d in found} == set(map(str, range(10, 20)))
        assert all(d.page_content for d in found)
        writer.run("store.add_texts(['part new'], ids=['new'])")
        assert "new" in {d.id for d in retriever.invoke("part new")}  # by its words
        writer.run("store.add_texts(['part newer'], ids=['newer'])")
        newest = [Document("part newer", id="newer")]
        for reranker in (BGEM3Reranker(vectorstore=store), BGEM3Reranker(embeddings=tiny)):
            [found] = reranker.compress_documents(newest, "part newer")
            assert found.metadata["bge_m3_relevance_score"] > 0.5


@pytest.mark.parametrize(
    "search",
    ["similarity_search", "similarity_search_with_score", "max_marginal_relevance_search"],
)
def test_a_search_that_a_writer_disturbs_is_made_again(tmp_path, monkeypatch, search):
    store = open_chroma(HashedEmbeddings(), "notes", persist_directory=tmp_path)
    store.add_texts(["part one"])
    query, calls = Collection.query, []

    def disturbed(self, **options):
        calls.append(self)
        if len(calls) < 5:
            raise InternalError  # as where an id is not found
        return query(self, **options)

    monkeypatch.setattr(Collection, "query", disturbed)
    assert len(getattr(store, search)("part")) == 1
    assert len(set(map(id, calls))) == 5  # each on a folder that was opened again

    def damaged(self, **options):
        raise InternalError

    monkeypatch.setattr(Collection, "query", damaged)
    with pytest.raises(OSError, match="Could not read or write"):
        getattr(store, search)("part")


@pytest.mark.usefixtures("_at_once")
def test_many_threads_read_while_another_process_writes(tiny, tiny_checkpoint, tmp_path):
    with Writer(tiny_checkpoint, tmp_path) as writer:
        writer.run("store.add_texts(['part one'], ids=['1'])")
        store = open_chroma(tiny, "notes", persist_directory=tmp_path)
        other = open_chroma(tiny, "notes", persist_directory=tmp_path)
        retriever = BGEM3Retriever(vectorstore=store, k=5)
        until = time.monotonic() + 4

        def search() -> int:
            searches = 0
            while time.monotonic() < until:
                found = [*retriever.invoke("part"), *other.similarity_search("part")]
                assert found
                assert all(d.page_content.startswith("part") for d in found)
                searches += 1
            return searches

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(search) for _ in range(3)]
            for n in range(15):
                writer.run(
                    f"store.add_texts(['part {n}'] * 5); store.delete(where_document="
                    f"{{'$contains': 'part {n - 1}'}})"
                )
            assert min(future.result() for future in running) > 1


def test_close_frees_the_folder(tiny, tmp_path):
    with open_chroma(tiny, persist_directory=tmp_path, lexical=True) as store:
        store.add_texts(["one"])
    with pytest.raises(RuntimeError, match="closed"):
        store.similarity_search("one")
    store.close()
    held = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    assert not [file for file in held if str(tmp_path) in file]
    assert open_chroma(tiny, persist_directory=tmp_path).get()["documents"] == ["one"]


def test_a_client_of_the_callers_stays_open(tmp_path):
    import chromadb

    client = chromadb.PersistentClient(str(tmp_path))
    open_chroma(HashedEmbeddings(), "notes", client=client).close()
    assert client.get_collection("notes", embedding_function=None).count() == 0


def test_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_chroma(HashedEmbeddings(), persist_directory="~/db").add_texts(["one"])
    assert (tmp_path / "db" / "chroma.sqlite3").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_a_forked_child_is_refused_at_once(memory, closed, tmp_path):
    """Where it used Chroma's library, it would wait for ever."""
    folder = None if memory else tmp_path
    store = open_chroma(HashedEmbeddings(), persist_directory=folder)
    store.add_texts(["one", "two"])
    assert store.similarity_search("one")
    if closed:
        store.close()
    child = os.fork()
    if not child:
        signal.alarm(30)
        with pytest.raises(RuntimeError, match="forked child"):
            store.similarity_search("one")
        with pytest.raises(RuntimeError, match="forked child"):
            store.add_texts(["one"])
        for place in (folder, None, tmp_path / "another"):
            with pytest.raises(RuntimeError, match=r"'spawn', or let both use a Chroma server"):
                open_chroma(HashedEmbeddings(), persist_directory=place)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_server_that_asks_for_patience_is_asked_again(monkeypatch):
    from chromadb.errors import RateLimitError
    from tenacity import wait_none

    monkeypatch.setattr(session.RETRYING, "wait", wait_none())
    answers = iter([RateLimitError("429"), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert session.retried(call) == 7


def test_compaction_by_a_client_of_the_callers(tmp_path):
    import chromadb

    store = open_chroma(HashedEmbeddings(), client=chromadb.PersistentClient(str(tmp_path)))
    index_documents(store, [Document(str(n)) for n in range(10)])
    store.delete(store.get()["ids"][:5])
    assert compact(store).passages == 5
    assert len(store.similarity_search("1", k=10)) == 5
