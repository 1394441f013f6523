"""`index_documents` and `aindex_documents`, on real Chroma in memory."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import time

import numpy as np
import pytest
from calls import WAIT
from hashed_embeddings import HashedEmbeddings
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import (
    IndexResult,
    aindex_documents,
    index_documents,
    index_vectors,
    open_chroma,
)
from langchain_bge_dense.chroma.settings import fingerprint_of


@pytest.fixture
def embeddings() -> HashedEmbeddings:
    return HashedEmbeddings()


def passages(count: int) -> list[Document]:
    return [Document(f"passage {i}", metadata={"number": i}) for i in range(count)]


def test_counts(embeddings):
    store = open_chroma(embeddings)
    documents = [*passages(5), *passages(3)]
    assert index_documents(store, documents, batch_size=4) == IndexResult(5, 3, 0)
    assert index_documents(store, documents) == IndexResult(0, 8, 0)
    assert embeddings.embedded == 5
    assert index_documents(store, passages(7)) == IndexResult(2, 5, 0)


def test_nothing(embeddings):
    assert index_documents(open_chroma(embeddings), []) == IndexResult(0, 0, 0)
    assert index_documents(open_chroma(embeddings), iter(())) == IndexResult(0, 0, 0)
    assert embeddings.batches == []


def test_documents_come_back_as_they_were(embeddings):
    store = open_chroma(embeddings)
    metadata = {"s": "a\0é", "i": -1, "f": 0.1, "b": True, "l": ["x", ""], "none": None}
    documents = [Document("one", metadata=metadata), Document("bare"), Document("")]
    index_documents(store, documents)
    found = {d.page_content: d.metadata for d in store.similarity_search("one", k=3)}
    del metadata["none"]
    assert found == {"one": metadata, "bare": {}, "": {}}


def test_equal_texts_with_other_metadata_are_two_documents(embeddings):
    store = open_chroma(embeddings)
    documents = [Document("same", metadata={"page": page}) for page in (1, 1.0, True, "1")]
    assert index_documents(store, documents) == IndexResult(4, 0, 0)


def test_input_is_read_a_batch_ahead(embeddings):
    store, read, ahead = open_chroma(embeddings), [], []

    def lazy():
        for document in passages(1_000):
            read.append(document)
            ahead.append(len(read) - len(store._collection.get(include=[])["ids"]))
            yield document

    assert index_documents(store, lazy(), batch_size=50).added == 1_000
    assert max(ahead) == 50


def test_more_than_chroma_takes_at_once():
    embeddings = HashedEmbeddings(2)
    store = open_chroma(embeddings)
    limit = store._client.get_max_batch_size()
    count = limit + 10
    assert index_documents(store, iter(passages(count)), batch_size=2 * limit).added == count
    assert list(map(len, embeddings.batches)) == [limit, 10]


def test_bar_over_documents(embeddings, capsys):
    index_documents(open_chroma(embeddings), passages(5), show_progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "tokens" not in shown  # these embeddings count none
    index_documents(open_chroma(embeddings), passages(5))
    assert capsys.readouterr().err == ""


def test_bar_over_tokens(tiny, capsys, caplog):
    caplog.set_level("INFO", "langchain_bge_dense")
    done = index_documents(open_chroma(tiny), passages(6), batch_size=2, show_progress=True)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "<" in shown.split("2/6")[1].split("]")[0]  # time left
    assert f"{done.tokens} tokens, 0 documents truncated]" in shown
    assert f"Indexed: {done}" in caplog.text
    index_documents(open_chroma(tiny), iter(passages(2)), show_progress=True)
    assert "2 documents [" in capsys.readouterr().err


def in_an_event_loop(*args, **kwargs):
    return asyncio.run(aindex_documents(*args, **kwargs))


@pytest.mark.parametrize("index", [index_documents, in_an_event_loop])
def test_bar_moves_with_each_batch_of_the_model(tiny, monkeypatch, index):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    one_text_each = tiny.model_copy(update={"batch_tokens": 1})
    encoder = one_text_each.load()._engine.encoder
    forward, ran = encoder.forward, []

    def after_it_was_shown(batch, outputs):
        until = time.monotonic() + WAIT
        while ran and f" {len(ran)}/4 " not in shown.getvalue():
            assert time.monotonic() < until, shown.getvalue()
            time.sleep(0.01)
        ran.append(len(batch))
        return forward(batch, outputs)

    encoder.forward = after_it_was_shown
    try:
        assert index(open_chroma(one_text_each), passages(4), show_progress=True).added == 4
    finally:
        del encoder.forward
    assert ran == [1] * 4
    assert " 4/4 " in shown.getvalue()
    assert "5/4" not in shown.getvalue()


def test_bad_arguments(embeddings):
    with pytest.raises(TypeError, match="store is list, not a BGEM3Chroma"):
        index_documents([], passages(1))
    with pytest.raises(ValueError, match="batch_size is 0"):
        index_documents(open_chroma(embeddings), passages(1), batch_size=0)
    with pytest.raises(TypeError, match=r"store is Chroma, not a BGEM3Chroma.* open_chroma"):
        index_documents(Chroma("plain", embeddings), passages(1))
    store = open_chroma(embeddings)
    for wrong in (Document("one"), "text", 7):
        with pytest.raises(TypeError, match=r"not an iterable of Documents.*\[document\]"):
            index_documents(store, wrong)


def test_an_error_leaves_earlier_batches(embeddings):
    store = open_chroma(embeddings)
    with pytest.raises(TypeError, match="Item 7 is str"):
        index_documents(store, [*passages(7), "text"], batch_size=3)
    assert len(store.get()["ids"]) == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_vectors_that_are_not_finite(embeddings, bad):
    store = open_chroma(embeddings)
    embed = embeddings.embed_documents
    embeddings.embed_documents = lambda texts: [
        [bad] * 8 if text == "passage 4" else vector
        for text, vector in zip(texts, embed(texts), strict=True)
    ]
    with pytest.raises(FloatingPointError, match="vector of document 4 is not finite"):
        index_documents(store, passages(6), batch_size=3)
    assert len(store.get()["ids"]) == 3


def test_fewer_vectors_than_texts(embeddings):
    store = open_chroma(embeddings)
    embeddings.embed_documents = lambda _: [[1.0] * 8]
    with pytest.raises(ValueError, match="gave 1 vectors for 2 texts"):
        index_documents(store, passages(2))


def test_langchain_index(embeddings):
    store = open_chroma(embeddings)
    records = InMemoryRecordManager("notes")
    records.create_schema()
    options = {"cleanup": "full", "source_id_key": "number", "key_encoder": "sha256"}
    assert index(passages(3), records, store, **options)["num_added"] == 3
    changed = [*passages(2), Document("new", metadata={"number": 2})]
    done = index(changed, records, store, **options)
    assert (done["num_added"], done["num_skipped"], done["num_deleted"]) == (1, 2, 1)
    assert sorted(store.get()["documents"]) == ["new", "passage 0", "passage 1"]


def test_bge_m3(tiny):
    store = open_chroma(tiny)
    tokens = sum(tiny.encode([f"passage {i}" for i in range(5)]).token_counts)
    assert index_documents(store, passages(5), batch_size=3) == IndexResult(5, 0, 0, tokens)
    found = store._collection.get(include=["documents", "embeddings"])
    expected = [
        tiny.encode(texts).dense for texts in (found["documents"][:3], found["documents"][3:])
    ]
    np.testing.assert_allclose(found["embeddings"], np.concatenate(expected), atol=1e-6)


def test_bge_m3_counts_what_it_truncated(tiny_checkpoint):
    short = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", max_length=8, on_truncate="ignore")
    documents = [Document("one"), Document("many words " * 20), Document("more " * 20)]
    store = open_chroma(short)
    tokens = sum(short.encode([d.page_content for d in documents]).token_counts)
    assert index_documents(store, documents) == IndexResult(3, 0, 2, tokens)
    assert index_documents(store, documents) == IndexResult(0, 3, 0)
    short.close()


class TestVectors:
    """`index_vectors`, which embeds nothing."""

    def embedded(self, count: int) -> list[tuple[Document, list[float]]]:
        documents = passages(count)
        vectors = HashedEmbeddings().embed_documents([d.page_content for d in documents])
        return list(zip(documents, vectors, strict=True))

    def test_are_stored_once_and_as_they_are(self, embeddings):
        store = open_chroma(embeddings)
        options = {"fingerprint": fingerprint_of(embeddings), "batch_size": 4}
        rows = self.embedded(10)
        assert index_vectors(store, iter([*rows[:7], *rows[:2]]), **options) == IndexResult(7, 2, 0)
        assert index_vectors(store, rows, **options) == IndexResult(3, 7, 0)
        assert index_documents(store, passages(11), batch_size=4) == IndexResult(1, 10, 0)
        assert embeddings.embedded == 1
        found = store._collection.get(include=["documents", "embeddings"])
        stored = dict(zip(found["documents"], found["embeddings"], strict=True))
        for document, vector in rows:
            np.testing.assert_allclose(stored[document.page_content], vector, atol=1e-6)

    def test_of_another_model_are_refused(self, embeddings):
        with pytest.raises(ValueError, match="holds vectors of"):
            index_vectors(open_chroma(embeddings), self.embedded(1), fingerprint="other")

    @pytest.mark.parametrize("vector", [[1.0] * 7, [[1.0] * 8], 1.0])
    def test_of_another_shape_are_named(self, embeddings, vector):
        rows = [*self.embedded(2), (Document("bad"), vector)]
        with pytest.raises(ValueError, match=r"vector of document 2 has the shape .* 8 numbers"):
            index_vectors(open_chroma(embeddings), rows, fingerprint=fingerprint_of(embeddings))

    def test_that_are_not_finite_are_named(self, embeddings):
        rows = [*self.embedded(2), (Document("bad"), [float("nan")] * 8)]
        store = open_chroma(embeddings)
        with pytest.raises(FloatingPointError, match="vector of document 2 is not finite"):
            index_vectors(store, rows, fingerprint=fingerprint_of(embeddings), batch_size=2)
        assert len(store.get()["ids"]) == 2


async def test_async(embeddings):
    store = await asyncio.to_thread(open_chroma, embeddings)
    assert await aindex_documents(store, passages(5), batch_size=2) == IndexResult(5, 0, 0)
    assert await aindex_documents(store, iter(passages(6)), batch_size=2) == IndexResult(1, 5, 0)
    assert list(map(len, embeddings.batches)) == [2, 2, 1, 1]


async def test_async_from_a_lazy_loader(embeddings):
    async def lazy():
        for document in passages(5):
            await asyncio.sleep(0)
            yield document

    store = open_chroma(embeddings)
    assert await aindex_documents(store, lazy(), batch_size=2) == IndexResult(5, 0, 0)
    assert list(map(len, embeddings.batches)) == [2, 2, 1]


async def test_async_cancelled(embeddings):
    store = open_chroma(embeddings)
    entered, released = threading.Event(), threading.Event()
    embed = embeddings.embed_documents

    def wait_and_embed(texts):
        entered.set()
        assert released.wait(60)
        return embed(texts)

    embeddings.embed_documents = wait_and_embed
    task = asyncio.create_task(aindex_documents(store, passages(9), batch_size=3))
    await asyncio.to_thread(entered.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    released.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert len(store.get()["ids"]) == 3
