"""Hybrid search over a real Chroma: what is found, what counts, what must not come back."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_chroma import Chroma

FILLER = [
    f"The {thing} in the {room} is cleaned every {day}."
    for thing in ("pump", "valve", "filter", "tank", "pipe")
    for room in ("cellar", "kitchen", "attic", "hall")
    for day in ("Monday", "Tuesday", "Friday")
]
PART = "Spare part ZB-2204 is kept on the third shelf."
NEAR_PART = "Spare part QX-7731 is kept on the fourth shelf."


def filled(embeddings: BGEM3Embeddings, texts: list[str], **options: Any) -> Chroma:
    store = open_chroma(embeddings, "parts", **options)
    documents = [Document(text, metadata={"row": row}) for row, text in enumerate(texts)]
    index_documents(store, documents, lexical=True)
    return store


@pytest.fixture(scope="module")
def store(small: BGEM3Embeddings) -> Chroma:
    return filled(small, [*FILLER, NEAR_PART, PART])


@pytest.fixture
def own_store(small: BGEM3Embeddings) -> Chroma:
    return filled(small, [*FILLER[:10], NEAR_PART, PART])


class TestStandard(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, store: Chroma) -> None:
        type(self)._store = store

    @property
    def retriever_constructor(self) -> type[BGEM3Retriever]:
        return BGEM3Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"vectorstore": self._store}

    @property
    def retriever_query_example(self) -> str:
        return "Where is the spare part?"


def texts(retriever: BGEM3Retriever, query: str, **options: Any) -> list[str]:
    return [document.page_content for document in retriever.invoke(query, **options)]


def test_the_lexical_signal_finds_a_part_number_that_dense_search_misses(
    small: BGEM3Embeddings,
) -> None:
    codes = [f"Spare part {a}{b}-{n}." for a in "ABZ" for b in "BCD" for n in (1117, 5863, 9902)]
    wanted = (
        "The garden is watered in the evening, the roses first and the lawn last. The hose for it "
        "is ZB-2204, and the tap is behind the shed, where the ladders and the paint are kept."
    )
    store = filled(small, [*FILLER, *codes, wanted])
    dense = BGEM3Retriever(vectorstore=store, k=1, weights=(1, 0, 0))
    lexical = BGEM3Retriever(vectorstore=store, k=1, weights=(0, 1, 0), fetch_k=1)
    assert texts(dense, "ZB-2204") != [wanted]
    assert texts(lexical, "ZB-2204") == [wanted]


def test_candidates_of_both_signals_are_scored_by_both(store: Chroma) -> None:
    documents = BGEM3Retriever(vectorstore=store, k=100).invoke("spare part ZB-2204")
    assert documents[0].page_content == PART
    relevance = [document.metadata["relevance_score"] for document in documents]
    assert relevance == sorted(relevance, reverse=True)
    for document in documents:
        assert document.metadata.keys() == {
            "row",
            "relevance_score",
            "dense_score",
            "lexical_score",
        }
        assert document.id


def test_scores_are_the_models_own(store: Chroma, small: BGEM3Embeddings) -> None:
    query = "spare part"
    asked = small.encode([query], lexical=True, colbert=True)
    for document in BGEM3Retriever(vectorstore=store, k=8, colbert=True).invoke(query):
        own = small.encode([document.page_content], lexical=True, colbert=True)
        shared = own.lexical[0].keys() & asked.lexical[0].keys()
        lexical = sum(own.lexical[0][token] * asked.lexical[0][token] for token in shared)
        colbert = (asked.colbert[0] @ own.colbert[0].T).max(axis=1).mean()
        assert document.metadata["dense_score"] == pytest.approx(
            float(asked.dense[0] @ own.dense[0]), abs=1e-4
        )
        assert document.metadata["lexical_score"] == pytest.approx(lexical, abs=1e-4)
        assert document.metadata["colbert_score"] == pytest.approx(float(colbert), abs=1e-4)


def test_weights_decide(store: Chroma) -> None:
    by_dense = BGEM3Retriever(vectorstore=store, k=5, weights=(1, 0, 0)).invoke("the pump")
    scores = [document.metadata["dense_score"] for document in by_dense]
    assert scores == sorted(scores, reverse=True)
    by_words = BGEM3Retriever(vectorstore=store, k=5, weights=(0, 1, 0)).invoke("the pump")
    scores = [document.metadata["lexical_score"] for document in by_words]
    assert scores == sorted(scores, reverse=True)


def test_weights_stay_out_of_the_metadata(store: Chroma) -> None:
    assert store.similarity_search(PART, k=1)[0].metadata == {"row": len(FILLER) + 1}
    assert all(metadata.keys() == {"row"} for metadata in store.get()["metadatas"])


def test_the_filter_holds_for_both_signals(store: Chroma) -> None:
    retriever = BGEM3Retriever(vectorstore=store, filter={"row": {"$lt": 5}}, k=50)
    rows = [document.metadata["row"] for document in retriever.invoke("spare part ZB-2204")]
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_the_callers_documents_in_the_store_are_not_changed(store: Chroma) -> None:
    before = store.get()
    BGEM3Retriever(vectorstore=store, colbert=True).invoke("pump")
    assert store.get() == before


def test_async_equals_sync(store: Chroma) -> None:
    retriever = BGEM3Retriever(vectorstore=store)
    assert asyncio.run(retriever.ainvoke("pump")) == retriever.invoke("pump")


class TestChangesThroughChroma:
    def test_a_deleted_passage_stays_away(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(vectorstore=own_store, k=3)
        [first, *_] = retriever.invoke("ZB-2204")
        assert first.page_content == PART
        own_store.delete([first.id])
        assert PART not in texts(retriever, "ZB-2204", k=50)

    def test_an_updated_passage_loses_its_old_words(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(vectorstore=own_store, k=50)
        [first, *_] = retriever.invoke("ZB-2204")
        own_store.update_document(first.id, Document("The attic is empty.", metadata={"row": 0}))
        [changed] = [d for d in retriever.invoke("ZB-2204") if d.id == first.id]
        assert changed.page_content == "The attic is empty."
        assert changed.metadata["lexical_score"] == 0

    def test_a_collection_made_anew_starts_empty(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(vectorstore=own_store, k=50)
        assert retriever.invoke("ZB-2204")
        own_store.reset_collection()
        with pytest.warns(UserWarning, match="no lexical weights"):
            assert retriever.invoke("ZB-2204") == []
        index_documents(own_store, [Document(NEAR_PART)], lexical=True)
        assert texts(retriever, "ZB-2204") == [NEAR_PART]

    def test_passages_added_later_are_found(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(vectorstore=own_store, k=1)
        retriever.invoke("warm up")
        index_documents(own_store, [Document("Grommet JK-5150.")], lexical=True)
        assert texts(retriever, "JK-5150") == ["Grommet JK-5150."]


def test_a_store_without_weights_works_and_says_so_once(small: BGEM3Embeddings) -> None:
    store = open_chroma(small, "plain")
    documents = [Document(text) for text in (PART, *FILLER[:5])]
    index_documents(store, documents)
    retriever = BGEM3Retriever(vectorstore=store, k=1)
    with pytest.warns(UserWarning, match="'plain' has no lexical weights"):
        assert texts(retriever, "spare part") == [PART]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retriever.invoke("spare part")
    assert index_documents(store, documents, lexical=True).added == len(documents)
    assert index_documents(store, documents, lexical=True).skipped == len(documents)
    assert retriever.invoke("spare part")[0].metadata["lexical_score"] > 0
    assert len(store.get()["ids"]) == len(documents)


def test_weights_survive_on_disk(small: BGEM3Embeddings, tmp_path: Path) -> None:
    import subprocess
    import sys

    filled(small, [*FILLER[:5], PART], persist_directory=tmp_path)
    code = (
        "import sys; from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever\n"
        "from langchain_bge_dense.chroma import open_chroma\n"
        "model = BGEM3Embeddings(model=sys.argv[1], dtype='float32', backend='torch')\n"
        "store = open_chroma(model, 'parts', persist_directory=sys.argv[2])\n"
        "[found] = BGEM3Retriever(vectorstore=store, k=1).invoke('ZB-2204')\n"
        "print(found.page_content, found.metadata['lexical_score'] > 0)\n"
    )
    command = [sys.executable, "-c", code, small.model, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{PART} True\n"


def test_an_empty_passage_scores_zero(small: BGEM3Embeddings) -> None:
    store = filled(small, ["", PART])
    found = BGEM3Retriever(vectorstore=store, k=2).invoke("spare part")
    scores = {d.page_content: d.metadata["lexical_score"] for d in found}
    assert scores[""] == 0
    assert np.isfinite(found[1].metadata["relevance_score"])


def test_an_empty_query_and_an_empty_store(small: BGEM3Embeddings, store: Chroma) -> None:
    assert len(BGEM3Retriever(vectorstore=store, k=2).invoke("")) == 2
    empty = filled(small, [])
    assert BGEM3Retriever(vectorstore=empty, colbert=True).invoke("pump") == []


class TestBadInput:
    @pytest.mark.parametrize("fields", [{"k": 0}, {"fetch_k": 0}, {"top_k": 3}])
    def test_fields(self, store: Chroma, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            BGEM3Retriever(vectorstore=store, **fields)

    def test_k_at_invoke(self, store: Chroma) -> None:
        with pytest.raises(ValueError, match="k is 0"):
            BGEM3Retriever(vectorstore=store).invoke("pump", k=0)

    @pytest.mark.parametrize("weights", [(1, 1), (-1, 1, 1), (0, 0, 0), (0, 0, 1)])
    def test_weights(self, store: Chroma, weights: Any) -> None:
        with pytest.raises(ValidationError, match="weights are"):
            BGEM3Retriever(vectorstore=store, weights=weights)

    def test_another_models_embeddings(self, store: Chroma, tiny: BGEM3Embeddings) -> None:
        with pytest.raises(ValidationError, match="tiny@"):
            BGEM3Retriever(vectorstore=store, embeddings=tiny)

    def test_foreign_embeddings(self) -> None:
        foreign = open_chroma(DeterministicFakeEmbedding(size=8), "foreign")
        with pytest.raises(ValidationError, match="DeterministicFakeEmbedding"):
            BGEM3Retriever(vectorstore=foreign)
        with pytest.raises(TypeError, match="gives no lexical weights"):
            index_documents(foreign, [Document("a")], lexical=True)

    def test_no_store(self) -> None:
        with pytest.raises(ValidationError, match="vectorstore is NoneType"):
            BGEM3Retriever(vectorstore=None)

    def test_a_dense_only_checkpoint(self, tmp_path: Path) -> None:
        from tiny_m3 import build

        folder = build(tmp_path / "dense-only", with_heads=False)
        embeddings = BGEM3Embeddings(model=folder, dtype="float32", backend="torch")
        store = open_chroma(embeddings, "dense-only")
        with pytest.raises(ValueError, match="dense-only checkpoint"):
            index_documents(store, [Document("a")], lexical=True)
        with pytest.raises(ValueError, match="dense-only checkpoint"):
            BGEM3Retriever(vectorstore=store, colbert=True).invoke("a")
