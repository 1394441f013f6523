"""A Chroma folder through kills, full disks and second processes, each a process of its own."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import chromadb
import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document

from langchain_bge_dense.chroma import folder as folders
from langchain_bge_dense.chroma import hnsw, index_documents, open_chroma

COUNT = 2_100  # Chroma persists its index at 1,000 and 2,000
SCRIPT = Path(__file__).parents[1] / "indexing_process.py"


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


def backups(folder: Path) -> list[Path]:
    return [*folder.glob("*.backup"), *folder.glob("*.unfinished")]


def test_killed_while_chroma_persists_its_index(tmp_path, undisturbed):
    dying = indexing(tmp_path, "die")
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGKILL
    assert len(backups(tmp_path)) == 1
    assert "added=140, skipped=1960" in finished(indexing(tmp_path))
    assert contents(tmp_path) == undisturbed
    assert not backups(tmp_path)


def test_a_search_after_such_a_kill_finds_all_that_was_stored(tmp_path, undisturbed):
    indexing(tmp_path, "die").communicate(timeout=120)
    found = contents(tmp_path)
    assert len(found) == 1_960
    assert found.items() <= undisturbed.items()


def test_an_index_is_backed_up_when_it_is_persisted_and_at_no_other_time(tmp_path, monkeypatch):
    made = []
    back_up = hnsw.back_up

    def watched(index, backup, **options):
        back_up(index, backup, **options)
        made.append(sum(file.stat().st_size for file in backup.iterdir()))

    monkeypatch.setattr(hnsw, "back_up", watched)
    store = open_chroma(HashedEmbeddings(256), persist_directory=tmp_path)
    documents = [Document(str(number)) for number in range(3_500)]
    assert index_documents(store, documents[:900], batch_size=100).added == 900
    assert made == []
    assert index_documents(store, documents[:1_000], batch_size=100).added == 100
    assert len(made) == 1
    assert index_documents(store, documents, batch_size=100).added == 2_500
    assert len(made) == 3
    [level_0] = tmp_path.glob("*/data_level0.bin")
    assert made[-1] < level_0.stat().st_size / 5
    assert not backups(tmp_path)


def test_an_outdated_backup_is_not_restored(tmp_path, undisturbed):
    finished(indexing(tmp_path))
    [index] = [file.parent for file in tmp_path.glob("*/header.bin")]
    for stale in (f"{index.name}.0.backup", "1c1d7d4a-0000-4000-8000-000000000000.0.backup"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "header.bin").write_bytes(b"old")
    assert contents(tmp_path) == undisturbed
    assert not backups(tmp_path)


def test_nothing_is_restored_while_the_writer_runs(tmp_path):
    folder = folders.Folder(str(tmp_path), "elsewhere")
    open_chroma(HashedEmbeddings(), persist_directory=tmp_path).close()
    folder.acquire_writer(1)
    (tmp_path / "1c1d7d4a-0000-4000-8000-000000000000.0.backup").mkdir()
    with pytest.raises(OSError, match="could not write Chroma's index to its end"):
        open_chroma(HashedEmbeddings(), persist_directory=tmp_path)
    folder.release_writer(1)
    open_chroma(HashedEmbeddings(), persist_directory=tmp_path).close()
    assert not backups(tmp_path)


def test_one_process_writes_at_a_time(tmp_path):
    first = indexing(tmp_path)
    first.stdout.readline()  # it has begun
    store = open_chroma(HashedEmbeddings(), "passages", persist_directory=tmp_path)
    with pytest.raises(RuntimeError, match=r"Another process has indexed into .* Chroma server"):
        index_documents(store, [Document("one")])
    with pytest.raises(RuntimeError, match="Another process"):
        store.add_texts(["one"])
    first.kill()
    first.communicate(timeout=120)
    assert index_documents(store, [Document("one")]).added == 1
    assert len(contents(tmp_path)) == len(store.get()["ids"])


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_writer_lets_go_when_its_store_is_closed_or_dropped(tmp_path, end):
    store = open_chroma(HashedEmbeddings(), "passages", persist_directory=tmp_path)
    index_documents(store, [Document("one")])
    if end == "close":
        store.close()
    else:
        del store
        gc.collect()
    assert finished(indexing(tmp_path)).startswith("IndexResult(added=2100")


def test_a_client_of_the_caller_is_guarded_too(tmp_path):
    client = chromadb.PersistentClient(str(tmp_path))
    store = open_chroma(HashedEmbeddings(), client=client)
    index_documents(store, [Document("one")])
    first = indexing(tmp_path)
    first.communicate(timeout=120)
    assert first.returncode == 1


def test_what_is_reported_as_added_is_on_the_disk(tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync

    def watched(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    with open_chroma(HashedEmbeddings(), persist_directory=tmp_path) as store:
        monkeypatch.setattr(os, "fsync", watched)
        index_documents(store, [Document(str(number)) for number in range(1_024)])
        files = [tmp_path / "chroma.sqlite3", *tmp_path.glob("*/*.*")]
        assert len(files) > 4
        assert {file.stat().st_ino for file in files} <= synced


def test_no_room_for_a_backup(tmp_path, monkeypatch):
    store = open_chroma(HashedEmbeddings(), persist_directory=tmp_path)
    documents = [Document(str(number)) for number in range(1_200)]

    def full(*_, **__):
        raise PermissionError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hnsw, "back_up", full)
        with pytest.raises(OSError, match=r"MiB are free: .*No space .* Make room"):
            index_documents(store, documents)
    assert len(store.get()["ids"]) == 768
    assert index_documents(store, documents).added == 1_200 - 768


def test_a_folder_that_may_not_be_written_to_is_not_a_full_one(tmp_path):
    folder = folders.Folder(str(tmp_path), "db")
    (tmp_path / "chroma.sqlite3").touch()
    readonly = sqlite3.OperationalError("attempt to write a readonly database")
    message = r"'db' may not be written to: .* right to write"
    with pytest.raises(PermissionError, match=message), folder.named_errors():
        raise readonly


def test_a_folder_that_was_removed_is_named(tmp_path):
    store = open_chroma(HashedEmbeddings(), persist_directory=tmp_path / "db")
    index_documents(store, [Document("one")])
    shutil.rmtree(tmp_path / "db")
    with pytest.raises(FileNotFoundError, match=r"db' holds no chroma.sqlite3 .* was removed"):
        index_documents(store, [Document("two")])


class TestDamage:
    """Files cut short or missing, which crash Chroma's process."""

    @pytest.fixture
    def index(self, tmp_path) -> Path:
        finished(indexing(tmp_path))
        return next(tmp_path.glob("*/header.bin")).parent

    @pytest.mark.parametrize("name", ["header.bin", "data_level0.bin", "link_lists.bin", hnsw.IDS])
    @pytest.mark.parametrize("rest", [None, 0, 0.5])
    def test_is_diagnosed(self, index, name, rest):
        file = index / name
        if rest is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: int(file.stat().st_size * rest)])
        with pytest.raises(OSError, match=r"'passages' is damaged: .* 2,100 texts .* are whole"):
            open_chroma(HashedEmbeddings(), "passages", persist_directory=index.parent)


def test_deletes_that_were_persisted_in_part_are_taken_back(tmp_path):
    documents = [Document(f"passage {number}", id=str(number)) for number in range(1_500)]
    with open_chroma(HashedEmbeddings(), "passages", persist_directory=tmp_path / "db") as store:
        index_documents(store, documents[:1_000], batch_size=500)
        shutil.copytree(tmp_path / "db", tmp_path / "killed")
        store.delete([str(number) for number in range(500)])
        index_documents(store, documents[1_000:], batch_size=500)
    [index] = [file.parent for file in (tmp_path / "killed").glob("*/header.bin")]
    shutil.copyfile(tmp_path / "db" / index.name / hnsw.LEVEL_0, index / hnsw.LEVEL_0)
    with closing(sqlite3.connect(tmp_path / "killed" / "chroma.sqlite3")) as database:
        query = "SELECT seq_id FROM max_seq_id WHERE segment_id = ?"
        [persisted] = database.execute(query, (index.name,)).fetchone()
    hnsw.back_up(index, index.with_name(f"{index.name}.{persisted}.backup"), loaded=True)
    assert not (index / hnsw.IDS).exists()
    found = contents(tmp_path / "killed")
    assert sorted(found) == sorted(str(number) for number in range(1_000))


class TestRepair:
    """Level 0 of an index after it was persisted in part."""

    def linked(self, links: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array(list(map(len, links)))
        rows = np.zeros((len(links), 4), np.uint32)
        for row, own in zip(rows, links, strict=True):
            row[: len(own)] = own
        return rows, counts

    def test_elements_out_of_reach_are_linked_again(self):
        links, counts = self.linked([[1], [0], [0, 1], []])
        assert hnsw._reached(links, counts, 0).tolist() == [True, True, False, False]
        hnsw._connect(links, counts, 0)
        assert hnsw._reached(links, counts, 0).all()

    def test_a_vector_that_the_links_of_an_unfinished_write_led_to(self, tmp_path):
        """Only a new vector, which the old header does not count, led to vector 2."""
        header = hnsw.Header(1, 0, 4, 3, 40, 24, 32, 0, 0, 4, 4, 2, 1.0, 10)
        elements = np.zeros(4, header.layout())
        for number, links in enumerate(([1, 3], [0], [0], [2])):
            elements[number]["count"], elements[number]["label"] = len(links), number
            elements[number]["links"][: len(links)] = links
        file = tmp_path / hnsw.LEVEL_0
        file.write_bytes(elements.tobytes())
        hnsw._repair(file, header, np.arange(3, dtype=np.uint64))
        repaired = np.fromfile(file, header.layout())[:3]
        links, counts = repaired["links"], repaired["count"].astype(np.int64)
        assert hnsw._reached(links, counts, 0).all()
        assert all(links[row, : counts[row]].max() < 3 for row in range(3))

    def test_ids_are_read_without_running_anything(self, tmp_path):
        (tmp_path / "ids").write_bytes(pickle.dumps(os.getcwd))
        with pytest.raises(pickle.UnpicklingError, match="names "):
            hnsw._labels(tmp_path / "ids")
