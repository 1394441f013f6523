"""The inverted index of lexical weights against sums by hand."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import index_of, keep
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.chroma import (
    BGEM3Chroma,
    compact,
    index_documents,
    open_chroma,
    signals,
)
from langchain_bge_dense.chroma.lexical import LexicalIndex
from langchain_bge_dense.chroma.signals import Position, key_of, pack, unpack

PASSAGES = st.dictionaries(st.integers(0, 9), st.floats(0.125, 4, width=16), max_size=5)
QUERIES = st.dictionaries(st.integers(0, 12), st.floats(0.125, 4, width=16), max_size=5)


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path) -> BGEM3Chroma:
    place = {"persist_directory": tmp_path} if request.param == "folder" else {}
    return open_chroma(HashedEmbeddings(), **place)


def keys(*ids: str) -> list[str]:
    """Keys of passages whose texts are their ids."""
    return list(map(key_of, ids, ids))


def add(store: BGEM3Chroma, passages: list[dict[int, float]], first: int = 0) -> None:
    keep(store, keys(*map(str, range(first, first + len(passages)))), lexical=passages)


def by_hand(query: dict[int, float], passage: dict[int, float]) -> float:
    return sum(query[token] * passage[token] for token in query.keys() & passage.keys())


def test_weights_are_packed_to_the_last_bit():
    rows = [{250_001: 0.1, 3: 0.25}, {}, {2**32 - 1: 0.7}]
    sizes, tokens, weights = unpack(list(map(pack, rows)))
    assert sizes.tolist() == [2, 0, 1]
    assert (tokens.tolist(), tokens.dtype) == ([250_001, 3, 2**32 - 1], np.uint32)
    assert weights.tolist() == np.array([0.1, 0.25, 0.7], np.float32).tolist()
    assert unpack([])[0].tolist() == []


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(PASSAGES, min_size=1, max_size=4), max_size=6), QUERIES)
def test_scores_over_many_entries(batches, query):
    store = open_chroma(HashedEmbeddings())
    passages = []
    for batch in batches:
        add(store, batch, first=len(passages))
        passages += batch
        index_of(store)
    weights = index_of(store)
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


def test_the_last_entry_of_a_passage_counts(store):
    add(store, [{1: 1.0}, {1: 2.0}])
    add(store, [{2: 1.0}])
    weights = index_of(store)
    assert len(weights) == 2
    assert weights.scores({1: 1.0}).ranked(5) == ["1"]
    assert weights.scores({2: 1.0}).ranked(5) == ["0"]


def test_a_text_that_is_being_replaced_keeps_its_weights(store):
    add(store, [{1: 1.0}, {1: 2.0}])
    former, new = keys("0")[0], key_of("0", "new")
    keep(store, [new], lexical=[{1: 4.0}])
    weights = index_of(store)
    scores = weights.scores({1: 1.0})
    assert scores.of([former, new]).tolist() == [1.0, 4.0]
    assert scores.ranked(3) == ["0", "1"]
    assert scores.ranked(3, among=["0"]) == ["0"]
    store.passages.signals.delete([former])
    scores = index_of(store).scores({1: 1.0})
    np.testing.assert_array_equal(scores.of([former, new]), [np.nan, 4.0])
    assert store.passages.signals.available([former, new]).keys() == {new}


def test_a_deleted_passage_that_comes_back(store):
    add(store, [{1: 1.0}])
    assert index_of(store).scores({1: 1.0}).ranked(5) == ["0"]
    store.passages.signals.delete(keys("0", "unknown"))
    assert index_of(store).scores({1: 1.0}).ranked(5) == []
    add(store, [{1: 3.0}])
    assert index_of(store).scores({1: 1.0}).of(keys("0")).tolist() == [3.0]
    fresh = LexicalIndex(store.passages.signals)
    fresh.sync()  # the whole table at once
    assert len(fresh) == 1
    assert fresh.scores({1: 1.0}).values.tolist() == [3.0]


def test_a_text_changed_behind_the_stores_back_has_no_score(store):
    add(store, [{1: 1.0}])
    scores = index_of(store).scores({1: 1.0}).of([key_of("0", "another"), *keys("1")])
    assert np.isnan(scores).all()
    assert scores.dtype == np.float32
    assert store.passages.signals.available(keys("0"))
    assert not store.passages.signals.available([key_of("0", "another")])


def test_large_token_ids(store):
    add(store, [{5: 1.0}])
    assert index_of(store).scores({1 << 18: 1.0}).values.tolist() == [0.0]
    add(store, [{5: 1.0, 1_000_000: 2.0}], first=1)
    weights = index_of(store)
    assert weights.scores({1_000_000: 1.0, 2_000_000: 1.0, 5: 1.0}).values.tolist() == [1.0, 3.0]


def test_what_was_read_is_not_read_again(store, monkeypatch):
    monkeypatch.setattr(signals, "_LOG_PAGE", 2)
    monkeypatch.setattr(signals, "_INDEX_PAGE", 2)
    for first in range(5):
        add(store, [{1: 1.0}], first=first)
    table = store.passages.signals
    pages = list(table.since(Position()))
    assert [len(rows) for _, rows in pages] == [2, 2, 1]
    assert list(table.since(pages[-1][0])) == []
    assert [key for _, rows in table.since(pages[1][0]) for key, _ in rows] == keys("4")
    assert len(index_of(store)) == 5


def test_scores_of_one_query_stay_while_others_write(store):
    add(store, [{1: 1.0}])
    before = index_of(store).scores({1: 1.0})
    add(store, [{1: 2.0}], first=1)
    weights = index_of(store)
    np.testing.assert_array_equal(before.of(keys("0", "1")), [1.0, np.nan])
    assert before.ranked(5, among=["1"]) == []
    assert weights.scores({1: 1.0}).ranked(5) == ["1", "0"]


def test_indexes_follow_a_compaction(store):
    other = LexicalIndex(store.passages.signals)
    for first in range(4):
        store.add_texts([str(first)], ids=[str(first)])
        add(store, [{1: first + 1.0, 9 - first: 1.0}], first=first)
    store.delete(["1"])
    for each in (other, index_of(store)):
        each.sync()
    compact(store)
    store.passages.signals.delete(keys("3"))
    for each in (other, index_of(store), LexicalIndex(store.passages.signals)):
        each.sync()  # the first ones had read the former table
        scores = each.scores({1: 1.0, 7: 1.0}).of(keys("0", "1", "2", "3"))
        np.testing.assert_array_equal(scores, [1.0, np.nan, 4.0, np.nan])
        assert len(each) == 2


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
