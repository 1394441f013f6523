"""The example that keeps a collection in step with a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from incremental_index import main, update
from inside import index_of

from langchain_bge_dense import BGEM3Embeddings, M3Encoding
from langchain_bge_dense.chroma import open_chroma

SCRIPT = Path(__file__).parents[2] / "examples" / "incremental_index.py"


class Counting(BGEM3Embeddings):
    """Counts the passages that are embedded."""

    _embedded: list[str]

    def encode(self, texts: list[str], **outputs: bool) -> M3Encoding:
        self._embedded += texts
        return super().encode(texts, **outputs)


@pytest.fixture
def embeddings(tiny) -> Counting:
    counting = Counting(**tiny.model_dump())
    counting._embedded = []
    return counting


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "bees.md").write_text(
        "Bees make honey. " + " ".join(f"Bee {n} dances." for n in range(90))
    )
    (folder / "trains.txt").write_text("Express trains do not stop at small stations.")
    (folder / "stars.csv").write_text("star,colour\nBetelgeuse,red\nRigel,blue\n")
    return folder


@pytest.fixture
def go(embeddings, folder, tmp_path):
    """Update and give what was embedded, what was deleted, and what the collection holds."""

    def go() -> tuple[int, int, list[str]]:
        embeddings._embedded.clear()
        store = open_chroma(embeddings, "notes", persist_directory=tmp_path / "db", lexical=True)
        done = update(store, folder, tmp_path / "db")
        assert done["num_added"] == len(embeddings._embedded)
        assert len(index_of(store)) == len(store.get()["ids"])
        sources = sorted(metadata["source"] for metadata in store.get()["metadatas"])
        return len(embeddings._embedded), done["num_deleted"], sources

    return go


def test_only_changed_files_are_embedded_again_and_deleted_ones_leave(go, folder):
    embedded, _, sources = go()
    bees = sources.count("bees.md")
    assert bees > 1
    assert embedded == len(sources) == bees + 3
    assert go() == (0, 0, sources)

    (folder / "trains.txt").write_text("Night trains stop at no station at all.")
    assert go() == (1, 1, sources)

    (folder / "bees.md").unlink()
    assert go() == (0, bees, ["stars.csv", "stars.csv", "trains.txt"])


def test_what_cannot_be_read_keeps_its_passages(go, folder):
    _, _, sources = go()
    (folder / "bees.md").write_bytes(b"\xff\xfe")
    (folder / "trains.txt").write_text("Night trains stop at no station at all.")
    assert go() == (1, 1, sources)


def test_a_collection_made_anew_is_filled_anew(go, embeddings, tmp_path):
    embedded, _, sources = go()
    store = open_chroma(embeddings, "notes", persist_directory=tmp_path / "db")
    store.delete_collection()
    assert go() == (embedded, 0, sources)


def test_as_its_user_runs_it(folder, tmp_path, tiny_checkpoint):
    command = [sys.executable, str(SCRIPT), str(folder), "--db", str(tmp_path / "db")]
    ended = subprocess.run(
        [*command, "--model", str(tiny_checkpoint)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(" added, 0 updated, 0 skipped, 0 deleted\n")


def test_an_error_is_one_line(folder, tmp_path, capsys):
    arguments = [str(folder), "--db", str(tmp_path / "db"), "--model", str(tmp_path / "none")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("Error: ")
