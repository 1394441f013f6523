"""What belongs to a passage, through every way of changing a hybrid store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chromadb import EphemeralClient
from chromadb.api.models.Collection import Collection
from hashed_embeddings import HashedEmbeddings
from inside import collections, index_of
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.stores import InMemoryByteStore

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import (
    BGEM3Chroma,
    compact,
    index_documents,
    index_vectors,
    open_chroma,
)
from langchain_bge_dense.chroma.settings import fingerprint_of
from langchain_bge_dense.chroma.signals import key_of

if TYPE_CHECKING:
    from pathlib import Path

PART = "Spare part ZB-2204 is kept on the third shelf."
TEXTS = [PART, "The garden is watered in the evening.", "The pump is in the cellar."]


@pytest.fixture
def store(tiny: BGEM3Embeddings) -> BGEM3Chroma:
    return open_chroma(tiny, "parts", lexical=True)


def lexical(store: BGEM3Chroma, query: str = "part ZB-2204") -> dict[str, float]:
    """Lexical scores above 0 by text."""
    retriever = BGEM3Retriever(vectorstore=store, k=50, weights=(0, 1, 0), scores=True)
    found = {d.page_content: d.metadata["bge_m3_lexical_score"] for d in retriever.invoke(query)}
    return {text: score for text, score in found.items() if score > 0}


def expected(embeddings: BGEM3Embeddings, texts: list[str], query: str = "part ZB-2204"):
    [asked] = embeddings.encode([query], dense=False, lexical=True).lexical
    rows = embeddings.encode(texts, dense=False, lexical=True).lexical
    scores = [sum(asked[t] * row[t] for t in asked.keys() & row.keys()) for row in rows]
    return {t: pytest.approx(s, rel=1e-4) for t, s in zip(texts, scores, strict=True) if s > 0}


def test_add_texts(store, tiny):
    assert store.add_texts(TEXTS, ids=["a", "b", "c"]) == ["a", "b", "c"]
    assert lexical(store) == expected(tiny, TEXTS)


def test_add_documents_and_their_async_forms(store, tiny):
    store.add_documents([Document(TEXTS[0])])
    asyncio.run(store.aadd_documents([Document(TEXTS[1], id="b")]))
    asyncio.run(store.aadd_texts([TEXTS[2]]))
    assert lexical(store) == expected(tiny, TEXTS)
    asyncio.run(store.adelete(["b"]))
    assert lexical(store) == expected(tiny, [TEXTS[0], TEXTS[2]])


def test_from_texts(tiny):
    store = BGEM3Chroma.from_texts(TEXTS, tiny, collection_name="made", lexical=True)
    assert lexical(store) == expected(tiny, TEXTS)


def test_update_documents(store, tiny):
    store.add_texts(TEXTS, [{"row": n, "old": True} for n in range(3)], ids=["a", "b", "c"])
    changed = Document("A new part.", metadata={"row": 7, "old": None})
    store.update_documents(["b", "nowhere"], [changed, Document("not stored")])
    assert lexical(store) == expected(tiny, [TEXTS[0], "A new part.", TEXTS[2]])
    assert store.get(ids=["b"])["metadatas"] == [{"row": 7}]
    store.update_document("b", Document("Another part."))
    assert store.get(ids=["b"])["metadatas"] == [{"row": 7}]
    assert len(store.get()["ids"]) == 3


def test_a_text_takes_the_place_of_the_one_with_its_id(store, tiny):
    store.add_texts([TEXTS[0]], [{"row": 1, "old": True}], ids=["a"])
    store.add_texts([TEXTS[1]], [{"row": 2}], ids=["a"])
    assert store.get()["documents"] == [TEXTS[1]]
    assert store.get()["metadatas"] == [{"row": 2}]
    assert lexical(store) == expected(tiny, [TEXTS[1]])


def test_deleted_passages_take_no_places_among_the_candidates(store):
    ids = store.add_texts([f"part ZB-2204 number {n}" for n in range(30)])
    store.add_texts(["The part is gone."], ids=["last"])
    store.delete(ids)
    retriever = BGEM3Retriever(vectorstore=store, k=1, fetch_k=1, weights=(0, 1, 0))
    assert [d.id for d in retriever.invoke("part ZB-2204")] == ["last"]
    assert len(index_of(store)) == 1


def test_delete_by_a_filter(store, tiny):
    store.add_texts(TEXTS, [{"row": n} for n in range(3)])
    store.delete(where={"row": {"$lt": 1}})
    assert lexical(store) == expected(tiny, TEXTS[1:])
    with pytest.raises(ValueError, match="needs a selection"):
        store.delete()
    store.delete([])
    assert len(store.get()["ids"]) == 2


@pytest.mark.parametrize("how", ["delete_collection", "reset_collection"])
def test_nothing_stays_of_a_collection_that_is_deleted(store, how):
    store.add_texts(TEXTS)
    getattr(store, how)()
    assert collections(store) == ([] if how == "delete_collection" else ["parts"])
    if how == "reset_collection":
        assert store.lexical
        store.add_texts([PART])
        assert list(lexical(store)) == [PART]


@pytest.mark.parametrize("cleanup", [None, "incremental", "full", "scoped_full"])
def test_langchain_index(store, tiny, cleanup):
    records = InMemoryRecordManager("parts")
    records.create_schema()
    options = {"cleanup": cleanup, "source_id_key": "file", "key_encoder": "sha256"}
    documents = [Document(text, metadata={"file": "one"}) for text in TEXTS]
    assert index(documents, records, store, **options)["num_added"] == 3
    changed = [*documents[1:], Document("A part of steel.", metadata={"file": "one"})]
    done = index(changed, records, store, **options)
    assert (done["num_added"], done["num_skipped"]) == (1, 2)
    texts = [d.page_content for d in changed] + ([] if cleanup else [PART])
    assert sorted(store.get()["documents"]) == sorted(texts)
    assert lexical(store) == expected(tiny, texts)


def test_the_uid_stays_as_long_as_the_passages(store):
    before = store.uid
    compact(store)
    assert store.uid == before
    store.reset_collection()
    assert store.uid != before


def test_the_collection_remembers_lexical(tiny, tmp_path):
    open_chroma(tiny, "parts", persist_directory=tmp_path, lexical=True).close()
    store = open_chroma(tiny, "parts", persist_directory=tmp_path)
    assert store.lexical
    index_documents(store, [Document(PART)])
    assert list(lexical(store)) == [PART]
    with pytest.raises(ValueError, match="'parts' has lexical weights"):
        open_chroma(tiny, "parts", persist_directory=tmp_path, lexical=False)
    with pytest.raises(ValueError, match="'parts' has lexical weights"):
        index_documents(store, [Document(PART)], lexical=False)


def test_passages_without_weights_are_completed(tiny):
    store = open_chroma(tiny, "parts")
    store.add_texts(TEXTS)
    assert not store.lexical
    assert store.add_missing() == 0
    index_documents(store, [], lexical=True)
    assert store.add_missing() == 3
    assert store.lexical
    assert lexical(store) == expected(tiny, TEXTS)
    vector = tiny.embed_query("part")
    index_vectors(store, [(Document("a part"), vector)], fingerprint=tiny.fingerprint)
    index_vectors(store, [(Document("a part"), vector)], fingerprint=tiny.fingerprint)
    with pytest.warns(UserWarning, match="1 of 4 passages"):
        lexical(store)
    assert store.add_missing() == 1
    assert store.add_missing() == 0


def test_documents_changed_behind_it_are_indexed_again(store):
    documents = [Document(text, metadata={"row": n}) for n, text in enumerate(TEXTS)]
    index_documents(store, documents)
    [first, *_] = store.get()["ids"]
    store.update_documents([first], [Document("Something else.")])
    assert index_documents(store, documents).added == 1
    assert sorted(store.get()["documents"]) == sorted(TEXTS)
    assert index_documents(store, documents).skipped == 3


def test_the_callers_ids_are_kept(store):
    assert index_documents(store, [Document("one", id="a", metadata={"k": 1})]).added == 1
    assert index_documents(store, [Document("one", id="a", metadata={"k": 1})]).skipped == 1
    assert index_documents(store, [Document("two", id="a", metadata={"l": 1})]).added == 1
    assert store.get()["ids"] == ["a"]
    assert store.get()["metadatas"] == [{"l": 1}]
    assert index_documents(store, [Document("two", id="a", metadata={"l": 1})]).skipped == 1


def test_what_a_search_gave_is_indexed_no_second_time(store):
    index_documents(store, [Document(text) for text in TEXTS])
    found = BGEM3Retriever(vectorstore=store, k=3, scores=True).invoke("part")
    assert index_documents(store, found).skipped == 3
    without_ids = [document.model_copy(update={"id": None}) for document in found]
    assert index_documents(store, without_ids).skipped == 3


class TestTruncated:
    """Texts that were cut, indexed again with more room."""

    def model(self, folder: Path, length: int | None) -> BGEM3Embeddings:
        return BGEM3Embeddings(
            model=folder,
            device="cpu",
            dtype="float32",
            max_length=length,
            on_truncate="ignore",
        )

    @pytest.mark.parametrize("lexical", [False, True])
    def test_are_embedded_again(self, tiny_checkpoint, tmp_path, lexical):
        documents = [Document("short"), Document("many words " * 20)]

        def indexed(length: int | None):
            embeddings = self.model(tiny_checkpoint, length)
            with open_chroma(embeddings, persist_directory=tmp_path) as store:
                return index_documents(store, documents, lexical=lexical or None)

        assert indexed(8).truncated == 1
        assert indexed(8).skipped == 2
        assert indexed(6).skipped == 2
        assert (indexed(16).added, indexed(16).skipped) == (1, 2)
        done = indexed(None)
        assert (done.added, done.truncated) == (1, 0)
        assert indexed(None).skipped == 2
        embeddings = self.model(tiny_checkpoint, None)
        store = open_chroma(embeddings, persist_directory=tmp_path)
        found = store.get(include=["documents", "embeddings"])
        whole = embeddings.encode(found["documents"]).dense
        np.testing.assert_allclose(found["embeddings"], whole, atol=1e-4)
        assert (
            not store.passages.signals.available(
                list(map(key_of, found["ids"], found["documents"]))
            )
            or lexical
        )

    def test_are_embedded_again_after_an_interruption(self, tiny_checkpoint, monkeypatch):
        documents, client = [Document("many words " * 20)], EphemeralClient()
        store = open_chroma(self.model(tiny_checkpoint, 8), "cut", client=client)
        assert index_documents(store, documents).truncated == 1
        store = open_chroma(self.model(tiny_checkpoint, None), "cut", client=client)

        def broken(*_args, **_columns):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Collection, "upsert", broken)
            with pytest.raises(KeyboardInterrupt):
                index_documents(store, documents)
        assert index_documents(store, documents).added == 1
        assert index_documents(store, documents).skipped == 1


class TestWrappers:
    """Caches around the embeddings."""

    def cached(self, embeddings) -> CacheBackedEmbeddings:
        return CacheBackedEmbeddings.from_bytes_store(
            embeddings, InMemoryByteStore(), namespace="n", key_encoder="sha256"
        )

    def test_are_their_model(self, tiny, tiny_checkpoint, tmp_path):
        assert fingerprint_of(self.cached(self.cached(tiny))) == tiny.fingerprint
        store = open_chroma(self.cached(tiny), "notes", persist_directory=tmp_path, lexical=True)
        index_documents(store, [Document(PART)])
        other = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", pooling="mean")
        with pytest.raises(ValueError, match="holds vectors of"):
            open_chroma(self.cached(other), "notes", persist_directory=tmp_path)
        open_chroma(tiny, "notes", persist_directory=tmp_path)
        found = BGEM3Retriever(vectorstore=store, embeddings=tiny, scores=True).invoke("part")
        assert found[0].metadata["bge_m3_lexical_score"] > 0
        assert BGEM3Retriever(vectorstore=store).invoke("part") != []

    def test_are_asked_where_they_can_answer(self):
        embeddings = HashedEmbeddings()
        cached = self.cached(embeddings)
        for name in ("one", "two"):
            index_documents(open_chroma(cached, name), [Document("a text")])
        assert embeddings.embedded == 1
