"""A Chroma folder through kills, full disks and second processes, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import chromadb
import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document

from langchain_bge_dense import _folder
from langchain_bge_dense._lexical import index_of
from langchain_bge_dense.chroma import index_documents, open_chroma

COUNT = 2_100  # Chroma rewrites its index at 1,000 and 2,000
SCRIPT = Path(__file__).with_name("indexing_process.py")


def indexing(folder: Path, *options: str) -> subprocess.Popen[str]:
    place = json.dumps({"persist_directory": str(folder)})
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), place, str(COUNT), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def finished(process: subprocess.Popen[str]) -> str:
    """The last line of a process, which has to end well."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()[-1]


def killed_after(process: subprocess.Popen[str], position: int) -> None:
    for line in process.stdout:
        if line.strip() == str(position):
            process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, tuple[str, str, bytes]]:
    """What is stored, by id, vectors to the last bit; the nearest neighbours are all there too."""
    store = open_chroma(HashedEmbeddings(), "passages", persist_directory=folder)
    found = store._collection.get(include=["documents", "metadatas", "embeddings"])
    vectors = np.asarray(found["embeddings"], np.float32)
    assert len(store.similarity_search("anything", k=len(vectors))) == len(vectors)
    metadatas = (json.dumps(metadata, sort_keys=True) for metadata in found["metadatas"])
    rows = zip(found["documents"], metadatas, map(bytes, vectors), strict=True)
    return dict(zip(found["ids"], rows, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, tuple[str, str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finished(indexing(folder)).endswith(f" {COUNT}")
    return contents(folder)


def test_killed_half_way(tmp_path, undisturbed):
    killed_after(indexing(tmp_path), 390)
    killed_after(indexing(tmp_path), 730)
    counts, _, embedded = finished(indexing(tmp_path)).rpartition(" ")
    assert f"added={embedded}" in counts
    assert int(embedded) <= COUNT - 680  # nothing that was stored is embedded again
    assert contents(tmp_path) == undisturbed


def test_killed_while_chroma_rewrites_its_index(tmp_path, undisturbed):
    dying = indexing(tmp_path, "die")
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.copy"))) == 1
    assert "added=140, skipped=1960" in finished(indexing(tmp_path))
    assert contents(tmp_path) == undisturbed
    assert not list(tmp_path.glob("*.copy"))


def test_a_copy_is_dropped_once_the_index_is_rewritten(tmp_path):
    store = open_chroma(HashedEmbeddings(), persist_directory=tmp_path)
    documents = [Document(str(number)) for number in range(3_000)]
    copies = []

    def watched():
        for document in documents:
            copies.extend(tmp_path.glob("*.copy"))
            yield document

    assert index_documents(store, watched()).added == 3_000
    assert copies == []
    assert not list(tmp_path.glob("*.copy")) + list(tmp_path.glob("*.unfinished"))


def test_an_outdated_copy_is_not_put_back(tmp_path, undisturbed):
    finished(indexing(tmp_path))
    [index] = [file.parent for file in tmp_path.glob("*/header.bin")]
    for stale in (f"{index.name}.0.copy", "1c1d7d4a-0000-4000-8000-000000000000.0.copy"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "header.bin").write_bytes(b"old")
    assert contents(tmp_path) == undisturbed
    assert not list(tmp_path.glob("*.copy"))


def test_one_process_writes_at_a_time(tmp_path):
    first = indexing(tmp_path)
    first.stdout.readline()  # it has begun
    store = open_chroma(HashedEmbeddings(), "passages", persist_directory=tmp_path)
    with pytest.raises(RuntimeError, match=r"Another process has indexed into .* Chroma server"):
        index_documents(store, [Document("one")])
    first.kill()
    first.communicate(timeout=120)
    assert index_documents(store, [Document("one")]).added == 1


def test_a_client_of_the_caller_is_guarded_too(tmp_path):
    client = chromadb.PersistentClient(str(tmp_path))
    index_documents(open_chroma(HashedEmbeddings(), client=client), [Document("one")])
    first = indexing(tmp_path)
    first.communicate(timeout=120)
    assert first.returncode == 1


def test_no_room_for_a_copy(tmp_path, monkeypatch):
    store = open_chroma(HashedEmbeddings(), persist_directory=tmp_path)
    documents = [Document(str(number)) for number in range(1_200)]

    def full(source, _target):
        raise _folder.shutil.Error([(source, "", "[Errno 28] No space left on device")])

    with monkeypatch.context() as patched:
        patched.setattr(_folder.shutil, "copytree", full)
        with pytest.raises(OSError, match=r"MiB are free: \[Errno 28\] No space .* Make room"):
            index_documents(store, documents)
    assert len(store.get()["ids"]) == 768
    assert index_documents(store, documents).added == 1_200 - 768


def test_the_log_of_lexical_weights_is_guarded_too(tmp_path, tiny):
    store = open_chroma(tiny, persist_directory=tmp_path)
    index_documents(store, [Document("first")], lexical=True)
    log = index_of(store, create=False).log
    [entry] = log.get()["metadatas"]
    many = {"ids": [str(n) for n in range(995)], "embeddings": np.ones((995, 1), np.float32)}
    log.upsert(**many, metadatas=[entry] * 995)
    upsert, copies = log.upsert, []

    def watched(**columns):
        copies.append(len(list(tmp_path.glob("*.copy"))))
        upsert(**columns)

    log.upsert = watched
    documents = [Document(str(number)) for number in range(6)]
    assert index_documents(store, documents, batch_size=1, lexical=True).added == 6
    assert copies == [0, 0, 0, 1, 0, 0]
