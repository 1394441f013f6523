"""`embed_dataset` on a local Ray, which `ray_process.py` runs, and what can be told without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from langchain_core.documents import Document
from ray_process import BAD, BLOCKS, FATAL, TEXTS

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._codes import Codec
from langchain_bge_dense.chroma import index_documents, index_vectors, open_chroma
from langchain_bge_dense.chroma.signals import key_of
from langchain_bge_dense.ray import _check, _Columns, _Embedder, embed_dataset

SCRIPT = Path(__file__).with_name("ray_process.py")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, str(SCRIPT), str(tiny_checkpoint), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    return sorted(json.loads((folder / "rows.json").read_text()), key=lambda row: row["number"])


def test_each_row_arrives_once_with_its_vector_though_an_actor_was_killed(rows, folder, tiny):
    assert (folder / "died").exists()
    assert [row["number"] for row in rows] == list(range(len(TEXTS)))
    assert [row["body"] for row in rows] == TEXTS
    good = [row for row in rows if row["reason"] is None]
    expected = tiny.encode([row["body"] for row in good], lexical=True)
    assert len(good) == len(TEXTS) - len(BAD)
    np.testing.assert_allclose([row["vector"] for row in good], expected.dense, atol=1e-6)
    for row, weights in zip(good, expected.lexical, strict=True):
        assert dict(row["weights"]) == pytest.approx(weights, abs=1e-5)


def test_only_the_block_in_hand_is_embedded_again(folder):
    logs = [file.read_text().splitlines() for file in folder.glob("*.log")]
    assert len(logs) == 3  # two actors, and the one that took the place of the killed one
    embedded = [text for log in logs for text in log if text in TEXTS]
    assert embedded.count(FATAL) == 2
    good = len(TEXTS) - len(BAD)
    assert good < len(embedded) <= good + len(TEXTS) // BLOCKS + 1


def test_rows_with_bad_texts_say_why(rows):
    bad = [row for row in rows if row["reason"] is not None]
    assert [row["body"] for row in bad] == BAD
    assert all(row["vector"] is row["weights"] is row["codes"] is None for row in bad)
    for row, reason in zip(bad, ("is int", "is NoneType", "surrogate", "has 92 tok"), strict=True):
        assert row["reason"].startswith("The text ")
        assert reason in row["reason"]


def test_codes_are_those_that_a_collection_would_compute(rows, tiny):
    good = [row for row in rows if row["reason"] is None]
    documents = [Document(row["body"], id=row["body"]) for row in good]
    codes = [bytes.fromhex(row["codes"]) for row in good]
    vectors = [row["vector"] for row in good]
    stores = [open_chroma(tiny, name, colbert="2bit") for name in ("computed", "given")]
    index_documents(stores[0], documents)
    embedded = zip(documents, vectors, codes, strict=True)
    index_vectors(stores[1], embedded, fingerprint=tiny.fingerprint)
    assert stores[1].add_missing() == 0
    keys = [key_of(document.id, document.page_content) for document in documents]
    computed, given = (store.passages.signals.codes(keys) for store in stores)
    assert given == dict(zip(keys, codes, strict=True))
    codec = stores[0].passages.codec()
    differing = 0
    for key in keys:
        ours, theirs = codec.decompress(given[key]), codec.decompress(computed[key])
        differing += np.count_nonzero(np.abs(ours - theirs) > 0.01)
    assert differing < 1e-3 * sum(codec.decompress(code).size for code in codes)


COLUMNS = _Columns("text", "vector", "weights", "error")
WITH_CODES = COLUMNS._replace(colbert="codes")


def test_codes_are_of_the_kind_that_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr("langchain_bge_dense._codes._CHARACTERS", 16)  # some texts at a time
    texts = ["word " * (n % 7) for n in range(20)] + [None]
    [table] = _Embedder(tiny, WITH_CODES, "int8", 2)(pa.table({"text": pa.array(texts)}))
    *codes, none = table.column("codes").to_pylist()
    codec = Codec.of(tiny, "int8", 2)
    expected = tiny.encode(texts[:-1], dense=False, colbert=True).colbert
    assert none is None
    assert table.column_names == ["text", "vector", "weights", "codes", "error"]
    for code, vectors in zip(codes, expected, strict=True):
        ours, theirs = codec.decompress(code), codec.decompress(codec.compress(vectors))
        np.testing.assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize(("kind", "pooling"), [("4bit", 1), (True, 1), ("1bit", 0)])
def test_codes_that_there_are_not_are_refused(kind, pooling):
    with pytest.raises(
        ValueError, match=rf"colbert={kind!r} with colbert_pooling={pooling} is not supported\. Use"
    ):
        embed_dataset(None, None, colbert=kind, colbert_pooling=pooling)


def test_blocks_without_rows_and_without_texts_keep_the_columns(tiny):
    embedder = _Embedder(tiny, COLUMNS)
    [empty] = embedder(pa.table({"text": pa.array([], pa.string())}))
    [whole] = embedder(pa.table({"text": ["one"]}))
    [lacking] = embedder(pa.table({"other": [1, 2]}))
    assert empty.schema == whole.schema
    assert len(empty) == 0
    assert lacking.column("vector").to_pylist() == [None, None]
    assert lacking.column("error")[0].as_py().startswith("The text is NoneType")


def test_a_large_block_is_embedded_in_windows(tiny, monkeypatch):
    monkeypatch.setattr("langchain_bge_dense.ray._ROWS", 8)
    texts = ["word " * (n % 7) for n in range(20)]
    parts = list(_Embedder(tiny, COLUMNS)(pa.table({"text": texts})))
    assert [len(part) for part in parts] == [8, 8, 4]
    vectors = np.concatenate([np.array(part.column("vector").to_pylist()) for part in parts])
    np.testing.assert_allclose(vectors, tiny.embed_documents(texts), atol=1e-6)


def test_a_row_whose_vector_is_not_finite(tiny, monkeypatch):
    encode = BGEM3Embeddings.encode

    def failing(self, texts, **options):
        if "bad" in texts:
            msg = f"Text {texts.index('bad')} has a vector that is not finite."
            raise FloatingPointError(msg)
        return encode(self, texts, **options)

    monkeypatch.setattr(BGEM3Embeddings, "encode", failing)
    [table] = _Embedder(tiny, COLUMNS)(pa.table({"text": ["one", "two", "bad", "three"]}))
    errors = table.column("error").to_pylist()
    assert errors == [None, None, "The text has a vector that is not finite.", None]


def test_a_model_that_cannot_be_loaded_is_no_rows_fault(tmp_path, tiny_checkpoint):
    with pytest.raises(FileNotFoundError):
        _Embedder(BGEM3Embeddings(model=tmp_path), COLUMNS)


@pytest.mark.parametrize(
    ("columns", "there", "message"),
    [
        (COLUMNS, ["body"], r"no column 'text'; it has body\. Name the one"),
        (COLUMNS, ["text", "vector"], "vector_column='vector' is the name of another column"),
        (COLUMNS, ["text", "error"], "error_column='error' is the name of another"),
        (_Columns("a", "a", None, "e"), ["a"], "vector_column='a' is"),
        (_Columns("a", "v", "v", "e"), ["a"], "lexical_column='v' is"),
        (_Columns("a", "v", "w", "w"), [], "error_column='w' is"),
        (WITH_CODES, ["text", "codes"], "colbert_column='codes' is"),
    ],
)
def test_column_names_are_checked(columns, there, message):
    with pytest.raises(ValueError, match=message):
        _check(columns, there)


def test_usage_statistics_are_off():
    code = "import langchain_bge_dense.ray, os; print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
