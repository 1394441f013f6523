"""Hybrid search over a real Chroma: what is found, what counts, what must not come back."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chromadb.api.models.Collection import Collection
from inside import plain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.records import record
from langchain_bge_dense.chroma.search import Search, nearest
from langchain_bge_dense.chroma.signals import Encoded, pack

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
    dense = BGEM3Retriever(scores=True, vectorstore=store, k=1, weights=(1, 0, 0))
    lexical = BGEM3Retriever(scores=True, vectorstore=store, k=1, weights=(0, 1, 0), fetch_k=1)
    assert texts(dense, "ZB-2204") != [wanted]
    assert texts(lexical, "ZB-2204") == [wanted]


def test_candidates_of_both_signals_are_scored_by_both(store: Chroma) -> None:
    documents = BGEM3Retriever(scores=True, vectorstore=store, k=100).invoke("spare part ZB-2204")
    assert documents[0].page_content == PART
    relevance = [document.metadata["bge_m3_fused_score"] for document in documents]
    assert relevance == sorted(relevance, reverse=True)
    for document in documents:
        assert document.metadata.keys() == {
            "row",
            "bge_m3_fused_score",
            "bge_m3_dense_score",
            "bge_m3_lexical_score",
        }
        assert document.id


def test_scores_are_the_models_own(store: Chroma, small: BGEM3Embeddings) -> None:
    query = "spare part"
    asked = small.encode([query], lexical=True, colbert=True)
    for document in BGEM3Retriever(scores=True, vectorstore=store, k=8, colbert=True).invoke(query):
        own = small.encode([document.page_content], lexical=True, colbert=True)
        shared = own.lexical[0].keys() & asked.lexical[0].keys()
        lexical = sum(own.lexical[0][token] * asked.lexical[0][token] for token in shared)
        colbert = (asked.colbert[0] @ own.colbert[0].T).max(axis=1).mean()
        assert document.metadata["bge_m3_dense_score"] == pytest.approx(
            float(asked.dense[0] @ own.dense[0]), abs=1e-4
        )
        assert document.metadata["bge_m3_lexical_score"] == pytest.approx(lexical, abs=1e-4)
        assert document.metadata["bge_m3_colbert_score"] == pytest.approx(float(colbert), abs=1e-4)


def test_weights_decide(store: Chroma) -> None:
    by_dense = BGEM3Retriever(scores=True, vectorstore=store, k=5, weights=(1, 0, 0)).invoke(
        "the pump"
    )
    scores = [document.metadata["bge_m3_dense_score"] for document in by_dense]
    assert scores == sorted(scores, reverse=True)
    by_words = BGEM3Retriever(scores=True, vectorstore=store, k=5, weights=(0, 1, 0)).invoke(
        "the pump"
    )
    scores = [document.metadata["bge_m3_lexical_score"] for document in by_words]
    assert scores == sorted(scores, reverse=True)


def test_weights_stay_out_of_the_metadata(store: Chroma) -> None:
    assert store.similarity_search(PART, k=1)[0].metadata == {"row": len(FILLER) + 1}
    assert all(metadata.keys() == {"row"} for metadata in store.get()["metadatas"])


def test_the_filter_holds_for_both_signals(store: Chroma) -> None:
    retriever = BGEM3Retriever(scores=True, vectorstore=store, filter={"row": {"$lt": 5}}, k=50)
    rows = [document.metadata["row"] for document in retriever.invoke("spare part ZB-2204")]
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_the_callers_documents_in_the_store_are_not_changed(store: Chroma) -> None:
    before = store.get()
    BGEM3Retriever(scores=True, vectorstore=store, colbert=True).invoke("pump")
    assert store.get() == before


OPTIONS: list[dict[str, Any]] = [
    {},
    {"k": 2},
    {"k": 7, "fetch_k": 1},
    {"weights": (0, 1, 0)},
    {"filter": {"row": {"$lt": 5}}},
    {"where_document": {"$contains": "valve"}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_sync_and_async_take_the_same_options(store: Chroma, options: dict[str, Any]) -> None:
    retriever = BGEM3Retriever(vectorstore=store, scores=True)
    found = retriever.invoke("the pump", **options)
    assert found == BGEM3Retriever(vectorstore=store, scores=True, **options).invoke("the pump")
    assert asyncio.run(retriever.ainvoke("the pump", **options)) == found
    assert asyncio.run(retriever.abatch(["the pump"], **options)) == [found]
    assert retriever.batch(["the pump"], **options) == [found]
    if options:
        assert found != retriever.invoke("the pump")


def test_unknown_options_are_refused_by_both(store: Chroma) -> None:
    retriever = BGEM3Retriever(vectorstore=store)
    with pytest.raises(TypeError, match="top_k"):
        retriever.invoke("pump", top_k=3)
    with pytest.raises(TypeError, match="top_k"):
        asyncio.run(retriever.ainvoke("pump", top_k=3))


def test_a_filter_of_a_call_takes_the_place_of_the_retrievers(store: Chroma) -> None:
    retriever = BGEM3Retriever(vectorstore=store, filter={"row": {"$lt": 5}}, k=100)
    assert len(retriever.invoke("pump")) == 5
    assert [d.metadata["row"] for d in retriever.invoke("pump", filter={"row": 9})] == [9]
    assert len(retriever.invoke("pump", filter={})) == len(FILLER) + 2
    assert all(
        "attic" in d.page_content
        for d in retriever.invoke("pump", where_document={"$contains": "attic"})
    )


def test_scores_are_left_out_unless_asked_for(store: Chroma) -> None:
    [found] = BGEM3Retriever(vectorstore=store).invoke(PART, k=1)
    assert found.metadata == {"row": len(FILLER) + 1}


def test_several_queries_find_a_passage_once(store: Chroma) -> None:
    from langchain_classic.retrievers import MultiQueryRetriever
    from langchain_core.runnables import RunnableLambda

    queries = MultiQueryRetriever(
        retriever=BGEM3Retriever(vectorstore=store, k=5),
        llm_chain=RunnableLambda(lambda _: ["spare part", "part ZB-2204", "a spare part"]),
    )
    found = [document.page_content for document in queries.invoke("parts")]
    assert len(found) == len(set(found))


def test_traces_name_model_and_store(store: Chroma, small: BGEM3Embeddings) -> None:
    params = BGEM3Retriever(vectorstore=store)._get_ls_params()
    assert params["ls_vector_store_provider"] == "BGEM3Chroma"
    assert params["ls_embedding_provider"] == "BGEM3Embeddings"
    assert params["ls_embedding_model"] == small.model


@pytest.mark.parametrize("colbert", [False, True])
def test_the_fused_score_is_a_sum_of_standard_scores(store: Chroma, colbert: bool) -> None:
    weights = (0.7, 0.2, 0.4)
    retriever = BGEM3Retriever(
        vectorstore=store, weights=weights, k=100, fetch_k=100, colbert=colbert, scores=True
    )
    found = [document.metadata for document in retriever.invoke("spare part ZB-2204")]
    signals = ["dense", "lexical", "colbert"][: 2 + colbert]
    raw = np.array([[m[f"bge_m3_{signal}_score"] for signal in signals] for m in found])
    expected = ((raw - raw.mean(axis=0)) / raw.std(axis=0)) @ weights[: len(signals)]
    fused = [metadata["bge_m3_fused_score"] for metadata in found]
    np.testing.assert_allclose(fused, expected, atol=1e-4)


@pytest.mark.parametrize("k", [15, 30])
def test_more_documents_than_candidates_or_colbert_takes(store: Chroma, k: int) -> None:
    retriever = BGEM3Retriever(vectorstore=store, k=k, fetch_k=3, colbert=True, scores=True)
    found = retriever.invoke("the pump in the cellar")
    assert len(found) == k
    assert all("bge_m3_colbert_score" in document.metadata for document in found)


def test_the_querys_instruction_counts(small: BGEM3Embeddings) -> None:
    instructed = small.model_copy(update={"query_instruction": "attic kitchen hall: "})
    store = filled(instructed, [*FILLER[:20], PART])
    retriever = BGEM3Retriever(vectorstore=store, k=50, scores=True, colbert=True)
    [encoded] = instructed.encode(["attic kitchen hall: pump"], lexical=True).lexical
    for document in retriever.invoke("pump"):
        own = instructed.encode([document.page_content], lexical=True).lexical[0]
        expected = sum(own[token] * encoded[token] for token in own.keys() & encoded.keys())
        assert document.metadata["bge_m3_lexical_score"] == pytest.approx(expected, abs=1e-4)


def test_dense_scores_are_cosines_without_normalisation_too(small: BGEM3Embeddings) -> None:
    long = small.model_copy(update={"normalize": False})
    passages = filled(long, [*FILLER[:20], PART]).passages
    vector = np.array(long.embed_query(PART), np.float32)

    def search(count: int) -> Search:
        return Search(PART, 4, count, (1, 0, 0), "standard")

    by_vectors = nearest(passages, vector, search(50))
    assert by_vectors.scores["dense"][0] == pytest.approx(1, abs=1e-4)
    by_words = nearest(passages, vector, search(1))
    by_words.add(passages, by_vectors.ids, vector)
    assert by_words.texts[0] == PART
    assert len(by_words.ids) == 21
    added, expected = (
        dict(zip(found.ids, found.scores["dense"].tolist(), strict=True))
        for found in (by_words, by_vectors)
    )
    assert added == {passage: pytest.approx(score, abs=1e-4) for passage, score in expected.items()}


@pytest.mark.parametrize("share", [2, 20, 1_000])
def test_lexical_candidates_are_all_that_pass_the_filter(
    small: BGEM3Embeddings, share: int
) -> None:
    """Recall of the lexical side is 1 for filters that keep one passage in `share`."""
    chooser = np.random.default_rng(share)
    words = [f"w{number}" for number in range(30)]
    store = open_chroma(small, "many", lexical=True)
    count = 3_000
    texts = [" ".join(chooser.choice(words, 3)) for _ in range(count)]
    rows = [{"group": number % share} for number in range(count)]
    tokens = {word: number for number, word in enumerate(words)}
    lexical = [{tokens[word]: float(chooser.random()) for word in text.split()} for text in texts]
    vectors = chooser.standard_normal((count, small.dimension)).astype(np.float32)
    passages = store.passages
    passages.acquire_writer()
    records = [
        record(Document(t, metadata=m, id=str(n)), n)
        for n, (t, m) in enumerate(zip(texts, rows, strict=True))
    ]
    passages.write(records, Encoded(vectors, list(map(pack, lexical))), {})
    query = {0: 1.0, 1: 0.5, 2: 0.25}
    exact = np.array([sum(w * row.get(t, 0) for t, w in query.items()) for row in lexical])
    exact[[number % share != 0 for number in range(count)]] = 0
    search = Search("", 4, 50, (0, 1, 0), "standard", filters={"where": {"group": 0}})
    among = passages.ids(**search.filters)
    assert passages.count_without_weights()
    found = passages.index.scores(query).ranked(50, among)
    order = np.argsort(-exact, kind="stable")[:50]
    expected = exact[order][exact[order] > 0]
    np.testing.assert_allclose([exact[int(passage)] for passage in found], expected, rtol=1e-5)
    one, other, deleted = (
        nearest(passages, vectors[0], search, given)
        for given in (None, among, [*among, "deleted meanwhile"])
    )
    assert sorted(one.ids) == sorted(other.ids) == sorted(deleted.ids)
    assert len(one.ids) == min(50, count // share)


class TestChangesThroughChroma:
    def test_a_deleted_passage_stays_away(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(scores=True, vectorstore=own_store, k=3)
        [first, *_] = retriever.invoke("ZB-2204")
        assert first.page_content == PART
        own_store.delete([first.id])
        assert PART not in texts(retriever, "ZB-2204", k=50)

    def test_an_updated_passage_loses_its_old_words(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(scores=True, vectorstore=own_store, k=50)
        [first, *_] = retriever.invoke("ZB-2204")
        own_store.update_document(first.id, Document("The attic is empty.", metadata={"row": 0}))
        [changed] = [d for d in retriever.invoke("ZB-2204") if d.id == first.id]
        assert changed.page_content == "The attic is empty."
        assert changed.metadata["bge_m3_lexical_score"] == 0

    def test_a_collection_made_anew_starts_empty(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(scores=True, vectorstore=own_store, k=50)
        assert retriever.invoke("ZB-2204")
        own_store.reset_collection()
        assert retriever.invoke("ZB-2204") == []
        index_documents(own_store, [Document(NEAR_PART)])
        assert texts(retriever, "ZB-2204") == [NEAR_PART]

    def test_passages_added_later_are_found(self, own_store: Chroma) -> None:
        retriever = BGEM3Retriever(scores=True, vectorstore=own_store, k=1)
        retriever.invoke("warm up")
        index_documents(own_store, [Document("Grommet JK-5150.")], lexical=True)
        assert texts(retriever, "JK-5150") == ["Grommet JK-5150."]


def test_a_store_without_weights_works_and_says_so_once(small: BGEM3Embeddings) -> None:
    store = open_chroma(small, "plain")
    documents = [Document(text) for text in (PART, *FILLER[:5])]
    index_documents(store, documents)
    retriever = BGEM3Retriever(scores=True, vectorstore=store, k=1)
    message = r"6 of 6 passages .* 'plain' have no lexical .*add_missing"
    with pytest.warns(UserWarning, match=message) as caught:
        assert texts(retriever, "spare part") == [PART]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retriever.invoke("spare part")
    assert index_documents(store, documents, lexical=True).added == len(documents)
    assert index_documents(store, documents, lexical=True).skipped == len(documents)
    assert retriever.invoke("spare part")[0].metadata["bge_m3_lexical_score"] > 0
    assert len(store.get()["ids"]) == len(documents)


def test_passages_are_counted_once_until_something_is_written(
    small: BGEM3Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chroma goes through all passages to count them."""
    store = filled(small, [PART, NEAR_PART], persist_directory=tmp_path)
    counted = []
    count = Collection.count
    monkeypatch.setattr(Collection, "count", lambda self: counted.append(1) or count(self))
    retriever = BGEM3Retriever(vectorstore=store, k=1, fetch_k=1)
    for _ in range(3):
        retriever.invoke("spare part")
    assert len(counted) == 1
    vectors = small.embed_documents([FILLER[0]])
    plain(store).add(ids=["plain"], documents=[FILLER[0]], embeddings=vectors)
    with pytest.warns(UserWarning, match="1 of 3 passages"):
        retriever.invoke("spare part")


def test_weights_survive_on_disk(prompted: BGEM3Embeddings, tmp_path: Path) -> None:
    import subprocess
    import sys

    filled(prompted, [*FILLER[:5], PART], persist_directory=tmp_path)
    code = (
        "import sys; from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever\n"
        "from langchain_bge_dense.chroma import open_chroma\n"
        "model = BGEM3Embeddings(model=sys.argv[1], dtype='float32')\n"
        "store = open_chroma(model, 'parts', persist_directory=sys.argv[2])\n"
        "[found] = BGEM3Retriever(scores=True, vectorstore=store, k=1).invoke('ZB-2204')\n"
        "print(found.page_content, found.metadata['bge_m3_lexical_score'] > 0)\n"
    )
    command = [sys.executable, "-c", code, prompted.model, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{PART} True\n"


def test_an_empty_passage_scores_zero(small: BGEM3Embeddings) -> None:
    store = filled(small, ["", PART])
    found = BGEM3Retriever(scores=True, vectorstore=store, k=2).invoke("spare part")
    scores = {d.page_content: d.metadata["bge_m3_lexical_score"] for d in found}
    assert scores[""] == 0
    assert np.isfinite(found[1].metadata["bge_m3_fused_score"])


def test_an_empty_query_and_an_empty_store(small: BGEM3Embeddings, store: Chroma) -> None:
    assert len(BGEM3Retriever(scores=True, vectorstore=store, k=2).invoke("")) == 2
    empty = filled(small, [])
    assert BGEM3Retriever(scores=True, vectorstore=empty, colbert=True).invoke("pump") == []


class TestBadInput:
    @pytest.mark.parametrize("fields", [{"k": 0}, {"fetch_k": 0}, {"top_k": 3}])
    def test_fields(self, store: Chroma, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            BGEM3Retriever(scores=True, vectorstore=store, **fields)

    def test_k_at_invoke(self, store: Chroma) -> None:
        with pytest.raises(ValueError, match=r"k\n.*greater than or equal to 1"):
            BGEM3Retriever(scores=True, vectorstore=store).invoke("pump", k=0)

    @pytest.mark.parametrize("weights", [(1, 1), (-1, 1, 1), (0, 0, 0), (0, 0, 1)])
    def test_weights(self, store: Chroma, weights: Any) -> None:
        with pytest.raises(ValidationError, match="weights are"):
            BGEM3Retriever(scores=True, vectorstore=store, weights=weights)

    def test_another_models_embeddings(self, store: Chroma, tiny: BGEM3Embeddings) -> None:
        with pytest.raises(ValidationError, match="tiny-"):
            BGEM3Retriever(scores=True, vectorstore=store, embeddings=tiny)

    def test_foreign_embeddings(self) -> None:
        foreign = open_chroma(DeterministicFakeEmbedding(size=8), "foreign")
        with pytest.raises(ValidationError, match="DeterministicFakeEmbedding"):
            BGEM3Retriever(scores=True, vectorstore=foreign)
        with pytest.raises(TypeError, match="computes dense vectors alone"):
            index_documents(foreign, [Document("a")], lexical=True)

    def test_no_store(self) -> None:
        with pytest.raises(ValidationError, match="vectorstore is NoneType"):
            BGEM3Retriever(scores=True, vectorstore=None)

    def test_a_dense_only_checkpoint(self, tmp_path: Path) -> None:
        from tiny_m3 import build

        folder = build(tmp_path / "dense-only", with_heads=False)
        embeddings = BGEM3Embeddings(model=folder, dtype="float32")
        store = open_chroma(embeddings, "dense-only")
        with pytest.raises(ValueError, match="dense-only checkpoint"):
            index_documents(store, [Document("a")], lexical=True)
        with pytest.raises(ValueError, match="dense-only checkpoint"):
            BGEM3Retriever(scores=True, vectorstore=store, colbert=True).invoke("a")
