"""`compact`: what is left in the files, and kills in the middle of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from threading import Thread
from typing import TYPE_CHECKING, Any

import chromadb
import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from inside import collections, index_of, settings_of
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.chroma import compact, compaction, hnsw, index_documents, open_chroma

if TYPE_CHECKING:
    from pathlib import Path


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def document(number: int, round_: int) -> Document:
    return Document(f"passage {number} of round {round_}", id=str(number), metadata={"n": number})


def test_fifty_rounds_of_replacing_a_fifth(tmp_path):
    count, embeddings = 1_200, HashedEmbeddings(64)
    latest = [document(number, 0) for number in range(count)]
    with open_chroma(embeddings, persist_directory=tmp_path / "old") as store:
        index_documents(store, latest)
        for round_ in range(1, 51):
            chosen = range(round_ % 5, count, 5)
            store.delete([str(number) for number in chosen])
            for number in chosen:
                latest[number] = document(number, round_)
            store.add_documents([latest[number] for number in chosen])
        before = size(tmp_path / "old")
        done = compact(store)
        assert done.bytes_before == before
        assert done.bytes_after == size(tmp_path / "old")
        assert done.freed == before - done.bytes_after > 0
        assert done.passages == count
        found = store.get(include=["documents", "embeddings"])
        assert sorted(found["documents"]) == sorted(d.page_content for d in latest)
        assert len(store.similarity_search("passage", k=count)) == count
    with open_chroma(embeddings, persist_directory=tmp_path / "new") as store:
        index_documents(store, latest)
    assert size(tmp_path / "old") <= 1.2 * size(tmp_path / "new")


def test_nothing_of_a_deleted_passage_is_in_any_file(tiny, tmp_path):
    store = open_chroma(tiny, persist_directory=tmp_path, lexical=True)
    texts = [f"secretive wording {number} of the annual report" for number in range(1_100)]
    index_documents(store, [Document(text, id=text[-40:]) for text in texts[:1_050]])
    deleted, kept = texts[:30], texts[30:1_050]
    ids = [text[-40:] for text in deleted]
    vectors = store.get(ids=ids, include=["embeddings"])["embeddings"]
    store.delete(ids)
    compact(store)
    contents = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert kept[0].encode() in contents
    for text, vector in zip(deleted, np.asarray(vectors, np.float32), strict=True):
        assert text.encode() not in contents
        assert vector.tobytes() not in contents
    assert sorted(store.get()["documents"]) == sorted(kept)
    retriever = BGEM3Retriever(vectorstore=store, k=2, weights=(0, 1, 0), scores=True)
    assert retriever.invoke(kept[0])[0].metadata["bge_m3_lexical_score"] > 0
    assert len(index_of(store)) == len(kept)
    index_documents(store, [Document("more")])
    assert len(index_of(store)) == len(kept) + 1


def test_words_of_deleted_passages_leave_the_full_text_index(tmp_path):
    words = np.random.default_rng(0).choice(list("abcdefghijklm"), (300, 60, 6))
    kept = [Document(" ".join(map("".join, text))) for text in words]
    deleted = [f"{chr(0x4E00 + n)}{chr(0x5E00 + n)}{chr(0x6E00 + n)}" for n in range(30)]
    with open_chroma(HashedEmbeddings(), persist_directory=tmp_path) as store:
        index_documents(store, [Document(text, id=text) for text in deleted] + kept)
        store.delete(deleted)
        compact(store)
        content = (tmp_path / "chroma.sqlite3").read_bytes()
        # FTS5 writes a word without what it shares with the one before it.
        assert not [text for text in deleted if text.encode()[3:] in content]
        assert len(store.get(where_document={"$contains": kept[0].page_content})["ids"]) == 1


def room(folder: Path) -> dict[str, int]:
    """Bytes in the files of vector indexes beyond those of their elements."""
    beyond = {}
    for index in (file.parent for file in folder.glob(f"*/{hnsw.HEADER}")):
        header = hnsw.Header.read(index)
        for name, size in ((hnsw.LEVEL_0, header.element_size), (hnsw.LENGTHS, 4)):
            surplus = (index / name).stat().st_size - header.elements * size
            beyond[f"{index.name}/{name}"] = surplus
    return beyond


@pytest.mark.parametrize("threshold", [3, 1_000])
def test_no_memory_of_the_process_is_in_the_files(tiny, tmp_path, threshold):
    configuration = {"hnsw": {"sync_threshold": threshold, "batch_size": 2}}
    options = {"persist_directory": tmp_path, "collection_configuration": configuration}
    with open_chroma(tiny, lexical=True, **options) as store:
        store.add_texts(["one", "two", "three", "four"])
        assert list(room(tmp_path).values()) == [0] * 2
        compact(store)
        assert list(room(tmp_path).values()) == [0] * 2
    with open_chroma(tiny, persist_directory=tmp_path) as store:  # Chroma makes small ones anew
        assert len(store.similarity_search("two", k=9)) == 4
        store.add_texts(["five", "six"])
        assert list(room(tmp_path).values()) == [0] * 2
    with open_chroma(tiny, persist_directory=tmp_path) as store:
        assert len(store.similarity_search("two", k=9)) == 6


def test_what_plain_chroma_wrote_beyond_its_elements_goes_too(tmp_path):
    client = chromadb.PersistentClient(os.fspath(tmp_path))
    plain = client.create_collection("plain", embedding_function=None)
    plain.add(ids=["a"], embeddings=[[1.0, 2.0]], documents=["a text"])
    assert min(room(tmp_path).values()) > 0
    client.close()
    with open_chroma(HashedEmbeddings(), persist_directory=tmp_path) as store:
        assert min(room(tmp_path).values()) > 0
        compact(store)
    assert list(room(tmp_path).values()) == [0] * 2


@pytest.mark.parametrize("folder", [True, False])
def test_threads_that_write_wait_for_it(tiny, tmp_path, monkeypatch, folder):
    place = {"persist_directory": tmp_path} if folder else {}
    store = open_chroma(tiny, "notes", lexical=True, colbert=True, **place)
    store.add_texts(["part one", "part two"], ids=["1", "2"])
    copy, writers = compaction._copy, []

    def slow_copy(*arguments: Any) -> None:
        copy(*arguments)
        for write in (
            lambda: store.add_texts(["part three"], ids=["3"]),
            lambda: store.delete(["1"]),
        ):
            writers.append(Thread(target=write))
            writers[-1].start()
        time.sleep(0.3)

    monkeypatch.setattr(compaction, "_copy", slow_copy)
    assert compact(store).passages == 2
    for writer in writers:
        writer.join()
    assert sorted(store.get()["ids"]) == ["2", "3"]
    retriever = BGEM3Retriever(vectorstore=store, k=5, scores=True)
    found = {d.id: d.metadata for d in retriever.invoke("part")}  # a warning is an error
    assert found.keys() == {"2", "3"}
    assert all(metadata["bge_m3_lexical_score"] > 0 for metadata in found.values())
    store.close()


def test_documents_without_metadata_and_an_empty_store(tmp_path):
    store = open_chroma(HashedEmbeddings(), persist_directory=tmp_path)
    assert compact(store).passages == 0
    index_documents(store, [Document("bare"), Document("", metadata={"k": [1, 2]})])
    before = store.get()
    assert compact(store).passages == 2
    assert store.get() == before
    assert settings_of(store).dimension == 8
    assert store._collection.configuration_json["hnsw"]["space"] == "cosine"


KILLED = """
import sys
from hashed_embeddings import HashedEmbeddings
from killing import kill_at
from langchain_bge_dense.chroma import compact, open_chroma

store = open_chroma(HashedEmbeddings(), "notes", persist_directory=sys.argv[1])
kill_at(*sys.argv[2:])
compact(store)
"""


@pytest.mark.parametrize(
    "moment",
    [
        ("Collection", "upsert", "2"),
        ("Collection", "modify", "1"),
        ("Client", "delete_collection", "2"),
        ("Collection", "modify", "2"),
    ],
)
def test_killed_at_any_step(tmp_path, moment):
    documents = [Document(str(number)) for number in range(2_100)]
    with open_chroma(HashedEmbeddings(), "notes", persist_directory=tmp_path) as store:
        index_documents(store, documents)
        store.delete(store.get()["ids"][:100])
        before = store.get()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, *moment], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with open_chroma(HashedEmbeddings(), "notes", persist_directory=tmp_path) as store:
        found = store.get()
        assert dict(zip(found["ids"], found["documents"], strict=True)) == dict(
            zip(before["ids"], before["documents"], strict=True)
        )
        assert len(store.similarity_search("1", k=2_000)) == 2_000
        assert compact(store).passages == 2_000
        assert collections(store) == ["notes"]
