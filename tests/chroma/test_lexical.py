"""The inverted index of lexical weights against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_bge_dense.chroma import lexical, open_chroma
from langchain_bge_dense.chroma.companions import Encoded
from langchain_bge_dense.chroma.lexical import Batch, LexicalWeights

PASSAGES = st.dictionaries(st.integers(0, 9), st.floats(0.125, 4, width=16), max_size=5)
QUERIES = st.dictionaries(st.integers(0, 12), st.floats(0.125, 4, width=16), max_size=5)


@pytest.fixture
def weights() -> LexicalWeights:
    return open_chroma(HashedEmbeddings())._passages.weights


def add(weights: LexicalWeights, passages: list[dict[int, float]], first: int = 0) -> None:
    ids = [str(first + number) for number in range(len(passages))]
    weights.add(ids, ids, Encoded(np.empty((len(ids), 0), np.float32), passages))


def by_hand(query: dict[int, float], passage: dict[int, float]) -> float:
    return sum(query[token] * passage[token] for token in query.keys() & passage.keys())


def test_a_batch_is_kept():
    batch = Batch.of(["a", "é"], ["x", "y"], [{250_001: 0.5, 3: 0.25}, {}])
    again = Batch.unpack(batch.pack())
    assert again.ids == ["a", "é"]
    for one, other in zip(batch[1:], again[1:], strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


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
    ids = list(map(str, range(len(passages))))
    np.testing.assert_allclose(scores.of(ids, ids), expected, rtol=1e-5)
    ranked = [expected[int(passage)] for passage in scores.ranked(3)]
    np.testing.assert_allclose(ranked, sorted(filter(None, expected), reverse=True)[:3], rtol=1e-5)


def test_the_last_entry_of_a_passage_counts(weights):
    add(weights, [{1: 1.0}, {1: 2.0}])
    add(weights, [{2: 1.0}])
    weights.sync()
    assert len(weights) == 2
    assert weights.scores({1: 1.0}).ranked(5) == ["1"]
    assert weights.scores({2: 1.0}).ranked(5) == ["0"]


def test_a_deleted_passage_that_comes_back(weights):
    add(weights, [{1: 1.0}])
    weights.remove(["0", "unknown"])
    weights.sync()
    assert weights.scores({1: 1.0}).ranked(5) == []
    add(weights, [{1: 3.0}])
    weights.sync()
    assert weights.scores({1: 1.0}).of(["0"], ["0"]).tolist() == [3.0]


def test_a_text_changed_behind_the_stores_back_scores_zero(weights):
    add(weights, [{1: 1.0}])
    weights.sync()
    assert weights.scores({1: 1.0}).of(["0", "1"], ["another", "1"]).tolist() == [0.0, 0.0]
    assert weights.present(["0"], ["0"])
    assert not weights.present(["0"], ["another"])


def test_large_token_ids(weights):
    add(weights, [{5: 1.0}])
    weights.sync()
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
