"""ColBERT codes of a store's passages: in step with them wherever they are, and used for scores."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chroma_server import ChromaServer
from chromadb.api.models.Collection import Collection
from hashed_embeddings import HashedEmbeddings
from inside import coded, index_of, keep, plain, settings_of
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker, BGEM3Retriever
from langchain_bge_dense._codes import Codec
from langchain_bge_dense._scoring import maxsim_scores
from langchain_bge_dense.chroma import (
    BGEM3Chroma,
    compact,
    index_documents,
    index_vectors,
    open_chroma,
    signals,
)
from langchain_bge_dense.chroma.signals import _SCHEMA, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUERY = "where is part ZB-2204 kept"
TEXTS = [
    "Spare part ZB-2204 is kept on the third shelf.",
    "The garden is watered in the evening.",
    "The pump is in the cellar.",
    "人人生而自由，在尊严和权利上一律平等。",
]
IDS = ["a", "b", "c", "d"]
KEYS = list(map(key_of, IDS, TEXTS))

Open = "Callable[..., BGEM3Chroma]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    with ChromaServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(params=["memory", "folder", "server"])
def opened(
    request: pytest.FixtureRequest, tiny: BGEM3Embeddings, tmp_path: Path
) -> Callable[..., BGEM3Chroma]:
    """Opens a store in each kind of place; twice gives the same data, but for memory."""
    place: dict[str, Any] = {}
    if request.param == "folder":
        place = {"persist_directory": tmp_path}
    if request.param == "server":
        running = request.getfixturevalue("server")
        place = {"host": running.host, "port": running.port}
    name = tmp_path.name

    def open_(embeddings: Any = tiny, **options: Any) -> BGEM3Chroma:
        return open_chroma(embeddings, name, **place, **options)

    return open_


def colbert(store: BGEM3Chroma, **options: Any) -> dict[str, float]:
    retriever = BGEM3Retriever(vectorstore=store, k=50, scores=True, **options)
    return {d.id: d.metadata["bge_m3_colbert_score"] for d in retriever.invoke(QUERY)}


def exact(tiny: BGEM3Embeddings, texts: list[str]) -> np.ndarray:
    query, passages = tiny.encode([QUERY], colbert=True), tiny.encode(texts, colbert=True)
    return maxsim_scores(query.colbert[0], passages.colbert)


def from_codes(store: BGEM3Chroma, tiny: BGEM3Embeddings, texts: list[str]) -> np.ndarray:
    codec = settings_of(store).codec()
    codes = [codec.compress(vectors) for vectors in tiny.encode(texts, colbert=True).colbert]
    return codec.maxsim(tiny.encode([QUERY], colbert=True).colbert[0], codes)


def test_every_change_keeps_them_in_step(opened: Open) -> None:
    store = opened(colbert=True)
    texts = dict(zip(IDS, TEXTS, strict=True))
    store.add_texts(TEXTS[:2], ids=IDS[:2])
    index_documents(store, [Document(texts[i], id=i) for i in IDS])
    assert coded(store, texts) == {*IDS}
    store.update_documents(["a"], [Document("another text")])
    assert coded(store, texts) == {"b", "c", "d"}
    assert coded(store, {"a": "another text"}) == {"a"}
    store.delete(["b", "c"])
    assert coded(store, texts) == {"d"}
    assert compact(store).passages == 2
    assert coded(store, {**texts, "a": "another text"}) == {"a", "d"}
    store.reset_collection()
    assert (store.colbert, coded(store, texts)) == ("1bit", set())
    store.add_texts(TEXTS, ids=IDS)
    assert coded(store, texts) == {*IDS}
    table = store.passages.signals
    store.delete_collection()
    assert table.codes(KEYS) == {}
    store.close()


def test_a_passage_keeps_what_belongs_to_it_until_it_is_replaced(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(lexical=True, colbert=True)
    store.add_texts(TEXTS, ids=IDS)
    retriever = BGEM3Retriever(vectorstore=store, k=50, scores=True)
    before = retriever.invoke(QUERY)
    upsert = Collection.upsert

    def broken(self: Collection, **columns: Any) -> None:
        if "documents" in columns:  # all that belongs to them is written
            raise KeyboardInterrupt
        upsert(self, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "upsert", broken)
        with pytest.raises(KeyboardInterrupt):
            store.add_texts(TEXTS[::-1], ids=IDS)
    for each in (retriever, BGEM3Retriever(vectorstore=store, k=50, scores=True)):
        for former, now in zip(before, each.invoke(QUERY), strict=True):
            assert (former.id, former.page_content) == (now.id, now.page_content)
            assert former.metadata == pytest.approx(now.metadata, abs=1e-5)
    store.add_texts(TEXTS[::-1], ids=IDS)
    assert coded(store, dict(zip(IDS, TEXTS, strict=True))) == set()
    assert coded(store, dict(zip(IDS, TEXTS[::-1], strict=True))) == {*IDS}
    assert len(index_of(store)) == len(IDS)
    store.close()


@pytest.mark.parametrize("kind", ["1bit", "2bit", "int8"])
@pytest.mark.parametrize("pooling", [1, 2])
def test_scores_are_read_from_them(
    tiny: BGEM3Embeddings, opened: Open, kind: str, pooling: int
) -> None:
    with opened(lexical=True, colbert=kind, colbert_pooling=pooling) as store:
        index_documents(store, [Document(t, id=i) for i, t in zip(IDS, TEXTS, strict=True)])
        found = colbert(store)
        scores = np.array([found[i] for i in IDS])
        np.testing.assert_allclose(scores, from_codes(store, tiny, TEXTS), atol=1e-5)
        assert np.abs(scores - exact(tiny, TEXTS)).max() > 1e-5  # they were not computed
        reranked = BGEM3Reranker(vectorstore=store).compress_documents(
            [Document(t, id=i) for i, t in zip(IDS, TEXTS, strict=True)], QUERY
        )
        again = {d.id: d.metadata["bge_m3_colbert_score"] for d in reranked}
        assert again == pytest.approx(found, abs=1e-5)


def test_int8_codes_order_as_the_vectors_do(tiny: BGEM3Embeddings) -> None:
    store = open_chroma(tiny, lexical=True, colbert="int8")
    store.add_texts(TEXTS, ids=IDS)
    plain = open_chroma(tiny, lexical=True)
    plain.add_texts(TEXTS, ids=IDS)
    assert plain.colbert is None
    found, computed = colbert(store), colbert(plain, colbert=True)
    assert found == pytest.approx(computed, abs=5e-3)
    assert list(found) == list(computed)
    without = BGEM3Retriever(vectorstore=plain, scores=True).invoke(QUERY)
    assert "bge_m3_colbert_score" not in without[0].metadata


def test_what_lacks_them_is_computed_once_and_can_be_completed(
    tiny: BGEM3Embeddings, opened: Open
) -> None:
    store = opened(lexical=True, colbert="int8")
    store.add_texts(TEXTS[:2], ids=IDS[:2])
    vectors = tiny.embed_documents(TEXTS[2:])
    given = [Document(t, id=i) for i, t in zip(IDS[2:], TEXTS[2:], strict=True)]
    index_vectors(store, zip(given, vectors, strict=True), fingerprint=tiny.fingerprint)
    retriever = BGEM3Retriever(vectorstore=store, weights=(1, 0, 1), k=9, scores=True)
    with pytest.warns(UserWarning, match=r"2 of 4 passages .* ColBERT codes.*add_missing"):
        found = {d.id: d.metadata["bge_m3_colbert_score"] for d in retriever.invoke(QUERY)}
    assert [found[i] for i in IDS] == pytest.approx(exact(tiny, TEXTS).tolist(), abs=5e-3)
    retriever.invoke(QUERY)  # says it once
    hybrid = BGEM3Retriever(vectorstore=store, weights=(1, 1, 1))
    with pytest.warns(UserWarning, match="2 of 4 passages") as caught:
        hybrid.invoke(QUERY)
    assert [str(w.message).partition(" have no ")[2][:7] for w in caught] == ["lexical", "ColBERT"]
    assert store.add_missing() == 2
    assert store.add_missing() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colbert(store).keys() == {*IDS}
    assert coded(store, dict(zip(IDS, TEXTS, strict=True))) == {*IDS}
    assert len(index_of(store)) == 4
    store.close()


def test_a_text_that_was_changed_behind_the_store_is_computed(
    tiny: BGEM3Embeddings, tmp_path: Path
) -> None:
    store = open_chroma(tiny, "notes", persist_directory=tmp_path, colbert=True)
    store.add_texts(TEXTS, ids=IDS)
    changed = {"documents": ["not a word of it"], "embeddings": [tiny.embed_query("word")]}
    plain(store).update(ids=["a"], **changed)
    with pytest.warns(UserWarning, match="1 of 4 passages"):
        found = colbert(store, weights=(1, 0, 1))
    texts = ["not a word of it", *TEXTS[1:]]
    assert found["a"] == pytest.approx(exact(tiny, texts)[0], abs=1e-5)


def test_the_reranker_encodes_what_the_store_does_not_hold(tiny: BGEM3Embeddings) -> None:
    store = open_chroma(tiny, lexical=True, colbert="int8")
    store.add_texts(TEXTS[:3], ids=IDS[:3])
    documents = [
        Document(TEXTS[0], id="a"),
        Document("changed since", id="b"),
        Document(TEXTS[2], id="unknown"),
        Document(TEXTS[3]),
    ]
    for weights in ((0.4, 0.2, 0.4), (0, 1, 0), (1, 0, 0), (0, 0, 1)):
        alone = BGEM3Reranker(embeddings=tiny, weights=weights)
        reading = BGEM3Reranker(vectorstore=store, weights=weights)
        expected = alone.compress_documents(documents, QUERY)
        found = reading.compress_documents(documents, QUERY)
        assert [d.page_content for d in found] == [d.page_content for d in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.metadata == pytest.approx(theirs.metadata, abs=2e-3)
    with pytest.raises(ValueError, match="Neither embeddings nor vectorstore"):
        BGEM3Reranker()
    other = tiny.model_copy(update={"pooling": "mean"})
    with pytest.raises(ValueError, match="holds vectors of"):
        BGEM3Reranker(vectorstore=store, embeddings=other)


class TestWhatTheCollectionKeeps:
    def test_it_is_decided_once(self, opened: Open) -> None:
        with opened(colbert="2bit", colbert_pooling=2) as store:
            assert store.colbert == "2bit"
            assert settings_of(store).pooling == 2
            store.add_texts(TEXTS)

    def test_it_is_followed_and_not_changed(self, tiny: BGEM3Embeddings, tmp_path: Path) -> None:
        place = {"persist_directory": tmp_path}
        open_chroma(tiny, "notes", colbert="2bit", lexical=True, **place).close()
        with open_chroma(tiny, "notes", **place) as store:
            assert (store.colbert, store.lexical) == ("2bit", True)
            store.add_texts(TEXTS, ids=IDS)
            assert coded(store, dict(zip(IDS, TEXTS, strict=True))) == {*IDS}
        for options in ({"colbert": True}, {"colbert": "2bit", "colbert_pooling": 2}):
            with pytest.raises(ValueError, match=r"'notes' has .*'2bit' ColBERT codes"):
                open_chroma(tiny, "notes", **options, **place)
        with pytest.raises(ValueError, match="colbert=False was requested"):
            open_chroma(tiny, "notes", colbert=False, **place)
        assert open_chroma(tiny, "notes", colbert="2bit", **place).colbert == "2bit"

    def test_a_collection_may_begin_later(self, tiny: BGEM3Embeddings, tmp_path: Path) -> None:
        place = {"persist_directory": tmp_path}
        with open_chroma(tiny, "notes", **place) as store:
            store.add_texts(TEXTS, ids=IDS)
        with open_chroma(tiny, "notes", colbert=True, **place) as store:
            assert index_documents(
                store, [Document(t, id=i) for i, t in zip(IDS, TEXTS, strict=True)]
            ).added == len(TEXTS)
            assert coded(store, dict(zip(IDS, TEXTS, strict=True))) == {*IDS}

    @pytest.mark.parametrize(
        "options",
        [
            {"colbert": "4bit"},
            {"colbert": ""},
            {"colbert": 1},
            {"colbert": True, "colbert_pooling": 0},
            {"colbert_pooling": 0},
        ],
    )
    def test_other_ways_are_refused(self, tiny: BGEM3Embeddings, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="is not supported"):
            open_chroma(tiny, **options)

    def test_embeddings_without_them_are_refused_before_anything_is_made(
        self, tmp_path: Path
    ) -> None:
        for options in ({"colbert": True}, {"lexical": True}):
            with pytest.raises(TypeError, match="HashedEmbeddings computes dense vectors alone"):
                open_chroma(HashedEmbeddings(), "notes", persist_directory=tmp_path, **options)
        store = open_chroma(HashedEmbeddings(), "notes", persist_directory=tmp_path)
        assert (store.colbert, store.lexical) == (None, False)

    def test_a_cache_in_front_of_the_model_does_not_hide_them(self, tiny: BGEM3Embeddings) -> None:
        from langchain_classic.embeddings import CacheBackedEmbeddings
        from langchain_core.stores import InMemoryByteStore

        cached = CacheBackedEmbeddings(tiny, InMemoryByteStore())
        store = open_chroma(cached, colbert=True)
        store.add_texts(TEXTS, ids=IDS)
        assert coded(store, dict(zip(IDS, TEXTS, strict=True))) == {*IDS}


def test_vectors_computed_elsewhere_bring_their_codes(tiny: BGEM3Embeddings, opened: Open) -> None:
    codec = Codec.of(tiny, "1bit")
    encoding = tiny.encode(TEXTS, colbert=True)
    codes = [codec.compress(vectors) for vectors in encoding.colbert]
    documents = [Document(t, id=i) for i, t in zip(IDS, TEXTS, strict=True)]
    with opened(colbert=True) as store:
        rows = zip(documents, encoding.dense, codes, strict=True)
        assert index_vectors(store, rows, fingerprint=tiny.fingerprint, batch_size=3).added == 4
        assert store.passages.signals.codes(KEYS) == dict(zip(KEYS, codes, strict=True))
        wrong = Codec.of(tiny, "2bit").compress(encoding.colbert[0])
        with pytest.raises(ValueError, match="are not of '1bit'"):
            index_vectors(
                store,
                [(Document("new"), encoding.dense[0], wrong)],
                fingerprint=tiny.fingerprint,
            )


def test_codes_that_are_there_are_not_computed_again(tiny: BGEM3Embeddings, opened: Open) -> None:
    codec = Codec.of(tiny, "1bit")
    encoding = tiny.encode(TEXTS, colbert=True)
    codes = [codec.compress(-vectors) for vectors in encoding.colbert]  # none that it would compute
    documents = [Document(t, id=i) for i, t in zip(IDS, TEXTS, strict=True)]
    with opened(lexical=True, colbert=True) as store:
        rows = zip(documents, encoding.dense, codes, strict=True)
        index_vectors(store, rows, fingerprint=tiny.fingerprint)
        assert store.add_missing() == 4
        assert store.add_missing() == 0
        assert store.passages.signals.codes(KEYS) == dict(zip(KEYS, codes, strict=True))


def test_in_a_folder_they_take_what_their_bits_take(tiny: BGEM3Embeddings, tmp_path: Path) -> None:
    store = open_chroma(tiny, "notes", persist_directory=tmp_path, colbert=True)
    wide = Codec("1bit", 1, np.zeros(1_024, np.float32))
    rng = np.random.default_rng(0)
    codes = [wide.compress(rng.standard_normal((200, 1_024)).astype(np.float32)) for _ in range(64)]
    keys = [key_of(f"{n:064}", "text") for n in range(64)]
    keep(store, keys, codes=codes)
    [file] = tmp_path.glob("*.signals.sqlite3")
    assert file.stat().st_size / 64 <= 27_000
    assert store.passages.signals.codes(keys) == dict(zip(keys, codes, strict=True))


def test_nothing_of_a_deleted_passage_is_left_in_any_file(
    tiny: BGEM3Embeddings, tmp_path: Path
) -> None:
    store = open_chroma(tiny, "notes", persist_directory=tmp_path, colbert="int8")
    index_documents(store, [Document(f"{TEXTS[0]} {n}", id=str(n)) for n in range(40)])
    [file] = tmp_path.glob("*.signals.sqlite3")
    size = file.stat().st_size
    [codes] = store.passages.signals.codes([key_of("7", f"{TEXTS[0]} 7")]).values()
    probe = codes[-64:]
    assert probe in file.read_bytes()
    store.delete([str(n) for n in range(30)])
    compact(store)
    assert file.stat().st_size < size / 2
    assert all(probe not in each.read_bytes() for each in tmp_path.rglob("*") if each.is_file())
    store.delete_collection()
    assert not list(tmp_path.glob("*.signals.sqlite3*"))


INDEXING = """
import sys
from langchain_core.documents import Document
from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import index_documents, open_chroma
model = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype="float32").load()
store = open_chroma(model, "notes", persist_directory=sys.argv[2], lexical=True, colbert="int8")
print("open", flush=True)
documents = (Document(f"part {n} of {n % 7}", id=str(n)) for n in range(1_200))
print(index_documents(store, documents, batch_size=20).added, flush=True)
"""


def test_killed_while_codes_are_written(
    tiny: BGEM3Embeddings, tiny_checkpoint: Path, tmp_path: Path, record_property: Any
) -> None:
    command = [sys.executable, "-c", INDEXING, tiny_checkpoint, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    moments, kills = random.Random(3), 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "open\n"
        if kills < 5:
            time.sleep(moments.uniform(0, 0.8))
            process.kill()
        process.communicate(timeout=120)
        kills += process.returncode != 0
        if process.returncode == 0:
            break
    record_property("tried", f"{kills} kills")
    assert kills
    texts = {str(n): f"part {n} of {n % 7}" for n in range(1_200)}
    store = open_chroma(tiny, "notes", persist_directory=tmp_path)
    assert len(store.get()["ids"]) == len(texts)
    assert coded(store, texts) == texts.keys()
    codec, some = settings_of(store).codec(), [str(n) for n in range(0, 1_200, 101)]
    keys = [key_of(i, texts[i]) for i in some]
    codes = store.passages.signals.codes(keys)
    encoding = tiny.encode([texts[i] for i in some], dense=False, colbert=True)
    for key, vectors in zip(keys, encoding.colbert, strict=True):
        np.testing.assert_allclose(codec.decompress(codes[key]), vectors, atol=0.01)


def test_a_full_disk_stores_neither_codes_nor_passages(
    tiny: BGEM3Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_chroma(tiny, "notes", persist_directory=tmp_path, colbert=True)
    documents = [Document(f"part {n} " * 20, id=str(n)) for n in range(200)]
    with monkeypatch.context() as patch:
        patch.setattr(signals, "_SCHEMA", f"{_SCHEMA} PRAGMA max_page_count = 24;")
        with pytest.raises(OSError, match=r"Could not read or write .* full.*Make room"):
            index_documents(store, documents, batch_size=20)
    stored = store.get()
    assert 0 < len(stored["ids"]) < 200
    assert coded(store, dict(zip(stored["ids"], stored["documents"], strict=True))) == {
        *stored["ids"]
    }
    done = index_documents(store, documents, batch_size=20)
    assert (done.added, done.skipped) == (200 - len(stored["ids"]), len(stored["ids"]))
    assert coded(store, {d.id: d.page_content for d in documents}) == {d.id for d in documents}


def test_a_transaction_that_was_killed_leaves_the_codes_of_before(
    tiny: BGEM3Embeddings, tmp_path: Path
) -> None:
    store = open_chroma(tiny, "notes", persist_directory=tmp_path, colbert=True)
    store.add_texts(TEXTS, ids=IDS)
    [file] = tmp_path.glob("*.signals.sqlite3")
    child = os.fork() if hasattr(os, "fork") else pytest.skip("this system has no fork")
    if not child:
        database = sqlite3.connect(file)
        database.execute("PRAGMA cache_size = 1")  # what is changed spills to the file
        database.execute("UPDATE passages SET codes = zeroblob(100000)")
        os._exit(1)
    os.waitpid(child, 0)
    found = colbert(store, weights=(1, 0, 1))
    np.testing.assert_allclose([found[i] for i in IDS], from_codes(store, tiny, TEXTS), atol=1e-5)


def test_codes_of_any_size_are_written_to_a_server(
    server: ChromaServer, tiny: BGEM3Embeddings
) -> None:
    """It takes requests of 40 MiB."""
    store = open_chroma(tiny, "large", host=server.host, port=server.port, colbert="int8")
    keys = [f"{number}" for number in range(60)]
    codes = [bytes([number]) * 1_000_000 for number in range(60)]
    keep(store, keys, codes=codes)
    assert store.passages.signals.codes(keys) == dict(zip(keys, codes, strict=True))
