"""The example that embeds tables with Ray and loads the vectors into a Chroma server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chroma_server import ChromaServer
from langchain_core.documents import Document
from ray_index import INPUTS, check_model, pending, stamp

from langchain_bge_dense.chroma import index_documents, open_chroma

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_index.py"


def lines(first: int, last: int) -> list[dict]:
    return [{"text": f"passage {n}", "number": n, "note": None} for n in range(first, last)]


@pytest.fixture
def tables(tmp_path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(lines(0, 40)), folder / "one.parquet")
    bad = {"text": None, "number": 99, "note": None}
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, [*lines(40, 60), bad])))
    return folder


def run(tables: Path, server: ChromaServer, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    place = ["--host", server.host, "--port", str(server.port), "--concurrency", "1"]
    where = [str(tables), "--vectors", str(tables.parent / "vectors"), "--model", str(checkpoint)]
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *where, *place],
        env={**os.environ, "PYTHONPATH": path, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_tables_become_vectors_and_vectors_a_collection_once(
    tables, tmp_path, tiny, tiny_checkpoint
):
    with ChromaServer(tmp_path / "server") as server:
        first = run(tables, server, tiny_checkpoint)
        assert first.returncode == 0, first.stderr
        assert first.stdout == "60 passages added, 0 were there.\n"
        assert "Rows without a vector: 1. The text is NoneType" in first.stderr
        again = run(tables, server, tiny_checkpoint)
        assert again.stdout == "0 passages added, 60 were there.\n"
        assert "Embedding" not in again.stderr

        store = open_chroma(tiny, "passages", host=server.host, port=server.port)
        found = store._collection.get(include=["documents", "metadatas", "embeddings"])
        assert sorted(m["number"] for m in found["metadatas"]) == list(range(60))
        expected = tiny.embed_documents(found["documents"])
        np.testing.assert_allclose(found["embeddings"], expected, atol=0.02)
        documents = [Document(row.pop("text"), metadata=row) for row in lines(0, 61)]
        done = index_documents(store, documents)
        assert (done.added, done.skipped) == (1, 60)  # the ids are those of index_documents
    [part] = (tmp_path / "vectors").glob("?????")
    assert (part / INPUTS).read_text().count("\n") == 2


def test_only_files_without_vectors_are_embedded(tables, tmp_path):
    vectors = tmp_path / "vectors"
    one, two = sorted(tables.iterdir())
    assert pending(tables, vectors) == [one, two]
    (vectors / "00000").mkdir(parents=True)
    (vectors / "00000" / INPUTS).write_text(f"{stamp(one)}\n")
    (vectors / "00001.unfinished").mkdir()
    (vectors / "00001.unfinished" / INPUTS).write_text(f"{stamp(two)}\n")
    assert pending(tables, vectors) == [two]
    one.write_text("another content")
    with pytest.raises(ValueError, match=r"one\.parquet has changed since its vectors"):
        pending(tables, vectors)


def test_a_folder_without_tables(tmp_path):
    with pytest.raises(ValueError, match=r"no file to read in .* \.parquet or \.jsonl"):
        pending(tmp_path, tmp_path / "vectors")


def test_vectors_of_another_model_are_refused(tmp_path):
    check_model(tmp_path / "vectors", "one")
    check_model(tmp_path / "vectors", "one")
    with pytest.raises(ValueError, match=r"holds vectors of one\. Give another folder"):
        check_model(tmp_path / "vectors", "another")
