"""The inverted index of lexical weights against sums by hand."""

from __future__ import annotations

import base64
import contextlib
import io
from itertools import pairwise

import numpy as np
import pytest
from chromadb.api.models.Collection import Collection
from hashed_embeddings import HashedEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.chroma import compact, index_documents, lexical, open_chroma
from langchain_bge_dense.chroma.companions import Encoded, key_of, passage_of
from langchain_bge_dense.chroma.lexical import Batch, LexicalWeights

PASSAGES = st.dictionaries(st.integers(0, 9), st.floats(0.125, 4, width=16), max_size=5)
QUERIES = st.dictionaries(st.integers(0, 12), st.floats(0.125, 4, width=16), max_size=5)


@pytest.fixture
def weights() -> LexicalWeights:
    return open_chroma(HashedEmbeddings())._passages.weights


def keys(*ids: str) -> list[str]:
    """Keys of passages whose texts are their ids."""
    return list(map(key_of, ids, ids))


def add(weights: LexicalWeights, passages: list[dict[int, float]], first: int = 0) -> None:
    ids = [str(first + number) for number in range(len(passages))]
    weights.add(keys(*ids), Encoded(np.empty((len(ids), 0), np.float32), passages))


def by_hand(query: dict[int, float], passage: dict[int, float]) -> float:
    return sum(query[token] * passage[token] for token in query.keys() & passage.keys())


def test_a_batch_is_kept():
    batch = Batch.of(["a", "é"], [{250_001: 0.5, 3: 0.25}, {}])
    assert [column.dtype for column in batch[1:]] == [np.uint32, np.uint32, np.float32]
    again = Batch.unpack(batch.pack())
    assert again.keys == ["a", "é"]
    for one, other in zip(batch[1:], again[1:], strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_what_is_stored_runs_no_code():
    stream = io.BytesIO()
    np.savez(stream, *[np.array([object()])] * 4)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Batch.unpack(base64.b64encode(stream.getvalue()).decode())


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(PASSAGES, min_size=1, max_size=4), max_size=6), QUERIES)
def test_scores_over_many_entries(batches, query):
    weights = open_chroma(HashedEmbeddings())._passages.weights
    passages = []
    for batch in batches:
        add(weights, batch, first=len(passages))
        passages += batch
        weights.sync()
    scores = weights.scores(query)
    expected = [by_hand(query, passage) for passage in passages]
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5)
    assert scores.values.dtype == np.float32
    ids = list(map(str, range(len(passages))))
    np.testing.assert_allclose(scores.of(keys(*ids)), expected, rtol=1e-5)
    ranked = [expected[int(passage)] for passage in scores.ranked(3)]
    np.testing.assert_allclose(ranked, sorted(filter(None, expected), reverse=True)[:3], rtol=1e-5)
    among = scores.ranked(2, among=["unknown", *ids[1::2]])
    best = sorted(filter(None, expected[1::2]), reverse=True)[:2]
    np.testing.assert_allclose([expected[int(passage)] for passage in among], best, rtol=1e-5)
    assert {int(passage) % 2 for passage in among} <= {1}
    parts = [part.nnz for part in weights._parts]
    assert all(one > 2 * other for one, other in pairwise(parts))


def test_the_last_entry_of_a_passage_counts(weights):
    add(weights, [{1: 1.0}, {1: 2.0}])
    add(weights, [{2: 1.0}])
    weights.sync()
    assert len(weights) == 2
    assert weights.scores({1: 1.0}).ranked(5) == ["1"]
    assert weights.scores({2: 1.0}).ranked(5) == ["0"]


def test_a_text_that_is_being_replaced_keeps_its_weights(weights):
    add(weights, [{1: 1.0}, {1: 2.0}])
    former, new = keys("0")[0], key_of("0", "new")
    weights.add([new], Encoded(np.empty((1, 0), np.float32), [{1: 4.0}]))
    weights.sync()
    scores = weights.scores({1: 1.0})
    assert scores.of([former, new]).tolist() == [1.0, 4.0]
    assert scores.ranked(3) == ["0", "1"]
    assert scores.ranked(3, among=["0"]) == ["0"]
    weights.remove([former])
    weights.sync()
    scores = weights.scores({1: 1.0})
    assert scores.of([former, new]).tolist() == [0.0, 4.0]
    assert weights.present([former, new]) == {new}


def test_a_deleted_passage_that_comes_back(weights):
    add(weights, [{1: 1.0}])
    weights.remove(keys("0", "unknown"))
    weights.sync()
    assert weights.scores({1: 1.0}).ranked(5) == []
    add(weights, [{1: 3.0}])
    weights.sync()
    assert weights.scores({1: 1.0}).of(keys("0")).tolist() == [3.0]
    fresh = LexicalWeights(weights.connection, weights.name.partition(".")[0])
    fresh.sync()  # the whole log at once
    assert len(fresh) == 1
    assert fresh.scores({1: 1.0}).values.tolist() == [0.0, 3.0]


def test_a_text_changed_behind_the_stores_back_scores_zero(weights):
    add(weights, [{1: 1.0}])
    weights.sync()
    scores = weights.scores({1: 1.0}).of([key_of("0", "another"), *keys("1")])
    assert (scores.tolist(), scores.dtype) == ([0.0, 0.0], np.float32)
    assert weights.present(keys("0"))
    assert not weights.present([key_of("0", "another")])


def test_large_token_ids(weights):
    add(weights, [{5: 1.0}])
    weights.sync()
    assert weights.scores({1 << 18: 1.0}).values.tolist() == [0.0]
    add(weights, [{5: 1.0, 1_000_000: 2.0}], first=1)
    weights.sync()
    assert weights.scores({1_000_000: 1.0, 2_000_000: 1.0, 5: 1.0}).values.tolist() == [1.0, 3.0]


def test_entries_are_read_once(weights, monkeypatch):
    unpacked = []
    unpack = Batch.unpack
    monkeypatch.setattr(Batch, "unpack", lambda packed: unpacked.append(1) or unpack(packed))
    monkeypatch.setattr(lexical, "_PAGE", 2)
    for first in range(5):
        add(weights, [{1: 1.0}], first=first)
    weights.sync()
    weights.sync()
    assert len(unpacked) == 5
    assert len(weights) == 5


def test_where_nothing_was_written_nothing_is_read(tmp_path, monkeypatch):
    weights = open_chroma(HashedEmbeddings(), persist_directory=tmp_path)._passages.weights
    weights.connection.acquire_writer()
    add(weights, [{1: 1.0}])
    weights.sync()
    read = []
    get = Collection.get
    monkeypatch.setattr(Collection, "get", lambda *a, **k: read.append(k) or get(*a, **k))
    weights.sync()
    assert not read
    add(weights, [{1: 1.0}], first=1)
    weights.sync()
    assert [k["include"] for k in read if "limit" in k] == [["metadatas"]] * 2
    assert len(weights) == 2


def test_scores_of_one_query_stay_while_others_write(weights):
    add(weights, [{1: 1.0}])
    weights.sync()
    before = weights.scores({1: 1.0})
    add(weights, [{1: 2.0}], first=1)
    weights.sync()
    assert before.of(keys("0", "1")).tolist() == [1.0, 0.0]
    assert before.ranked(5, among=["1"]) == []
    assert weights.scores({1: 1.0}).ranked(5) == ["1", "0"]


def test_compaction_writes_what_is_stored_in_large_entries(monkeypatch):
    monkeypatch.setattr(lexical, "_ENTRY", 2)
    store = open_chroma(HashedEmbeddings())
    weights = store._passages.weights
    other = LexicalWeights(weights.connection, store.uid)
    for first in range(4):
        store.add_texts([str(first)], ids=[str(first)])
        add(weights, [{1: first + 1.0, 9 - first: 1.0}], first=first)
    store.delete(["1"])
    other.sync()
    compact(store)
    stored = weights.collection().get(include=["metadatas", "embeddings"])
    batches = [Batch.unpack(entry["batch"]) for entry in stored["metadatas"]]
    assert [batch.keys for batch in batches] == [keys("0", "2"), keys("3")]
    for batch in batches:
        numbers = map(int, map(passage_of, batch.keys))
        again = Batch.of(batch.keys, [{1: i + 1.0, 9 - i: 1.0} for i in numbers])
        for one, two in zip(batch[1:], again[1:], strict=True):
            assert (one.tolist(), one.dtype) == (two.tolist(), two.dtype)
    for each in (weights, other):  # the other one had read the former log
        each.sync()
        assert each.scores({1: 1.0, 7: 1.0}).values.tolist() == [1.0, 4.0, 4.0]
        assert len(each) == 3


def test_the_ids_of_a_whole_vocabulary_are_found_again(small, tmp_path):
    """BGE-M3's ids end at 250,001, that of `<mask>`."""
    text = "耶稣 <mask>"
    with contextlib.closing(
        open_chroma(small, "ends", persist_directory=tmp_path, lexical=True)
    ) as store:
        index_documents(store, [Document(text), Document("bread")])
    with contextlib.closing(open_chroma(small, "ends", persist_directory=tmp_path)) as store:
        retriever = BGEM3Retriever(vectorstore=store, k=1, weights=(0, 1, 0), scores=True)
        [found] = retriever.invoke(text)
    [passage] = small.encode([text], lexical=True).lexical
    [query] = small.encode([text], lexical=True, query=True).lexical
    assert max(passage) == max(query) == 250_001
    assert found.page_content == text
    score = found.metadata["bge_m3_lexical_score"]
    assert score == pytest.approx(by_hand(query, passage), rel=0.01)  # kept in half precision
