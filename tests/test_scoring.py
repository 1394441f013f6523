"""Scores on hand-sized arrays, and against those of `BGEM3FlagModel` on the tiny checkpoint."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import flag_model

from langchain_bge_dense._scoring import (
    SCORE_KEYS,
    checked_weights,
    cosines,
    dense_scores,
    lexical_scores,
    maxsim_scores,
    product,
    scaled,
    score_key,
    standardized,
    weighted_mean,
)

QUERIES = ["Who is born free?", "dense vectors", "稠密向量是什么?", "x", ""]
PASSAGES = [
    "All human beings are born free and equal in dignity and rights.",
    "free free free, and free again",
    "An embedding turns a passage of text into a dense vector of numbers.",
    "向量检索把文本变成稠密向量,意思相近的文本在空间里也相近。",
    "x",
    "",
]
WEIGHTS = (0.4, 0.2, 0.4)
LEXICAL = st.dictionaries(st.integers(4, 12), st.floats(0, 4, width=32), max_size=8)


@pytest.fixture(scope="module")
def flag(tiny_checkpoint):
    return flag_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def encoded(flag):
    """Give what the model itself gives for queries and passages, token ids as numbers."""
    return [encode(flag, texts) for texts in (QUERIES, PASSAGES)]


def encode(flag, texts):
    output = flag.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    lexical = [{int(i): float(w) for i, w in row.items()} for row in output["lexical_weights"]]
    return output["dense_vecs"], lexical, output["colbert_vecs"]


def scores(encoded):
    """Score each query against all passages: three arrays `(Q, N)`."""
    (q_dense, q_lexical, q_colbert), (p_dense, p_lexical, p_colbert) = encoded
    return (
        np.stack([dense_scores(query, p_dense) for query in q_dense]),
        np.stack([lexical_scores(query, p_lexical) for query in q_lexical]),
        np.stack([maxsim_scores(query, p_colbert) for query in q_colbert]),
    )


def test_lexical_scores_equal_the_models(flag, encoded):
    (_, queries, _), (_, passages, _) = encoded
    expected = flag.compute_lexical_matching_score(queries, passages)
    ours = scores(encoded)[1]
    assert np.count_nonzero(expected) > len(PASSAGES)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def test_maxsim_scores_equal_the_models(flag, encoded):
    (_, _, queries), (_, _, passages) = encoded
    expected = [[flag.colbert_score(q, p) for p in passages] for q in queries]
    ours = scores(encoded)[2]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def test_all_scores_equal_those_of_compute_score(flag, encoded):
    # One pair at a time: in a padded batch the model's own MaxSim sees zeros for padding.
    expected = [
        flag.compute_score(pair, weights_for_different_modes=list(WEIGHTS))
        for pair in itertools.product(QUERIES, PASSAGES)
    ]
    dense, lexical, colbert = (part.ravel() for part in scores(encoded))
    ours = {
        "dense": dense,
        "sparse": lexical,
        "colbert": colbert,
        "sparse+dense": weighted_mean([dense, lexical], WEIGHTS[:2]),
        "colbert+sparse+dense": weighted_mean([dense, lexical, colbert], WEIGHTS),
    }
    for name, values in ours.items():
        reference = [score[name] for score in expected]
        np.testing.assert_allclose(values, reference, atol=1e-5, rtol=0, err_msg=name)


def test_cosines_by_hand():
    vectors = np.array([[3, 0], [3, 4], [-2, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(cosines(vectors, np.array([2, 0], np.float32)), [1, 0.6, -1, 0])


def test_lexical_score_by_hand():
    query = {9: 2.0, 5: 0.5}
    passages = [{5: 1.0, 9: 0.25}, {7: 3.0}, {}, {9: 1.0, 4: 1.0, 12: 1.0}]
    assert lexical_scores(query, passages).tolist() == [1.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("query", "passages", "expected"),
    [({}, [{5: 1.0}, {}], [0.0, 0.0]), ({5: 1.0}, [{}], [0.0]), ({5: 1.0}, [], []), ({}, [], [])],
)
def test_lexical_score_of_nothing_is_zero(query, passages, expected):
    assert lexical_scores(query, passages).tolist() == expected


@given(LEXICAL, st.lists(LEXICAL, max_size=6))
def test_lexical_scores_equal_the_sum_over_shared_tokens(query, passages):
    expected = [sum(query[i] * row[i] for i in query.keys() & row.keys()) for row in passages]
    np.testing.assert_allclose(lexical_scores(query, passages), expected, atol=1e-5)


def test_maxsim_by_hand():
    query = np.array([[1, 0], [0, 1]], np.float32)
    one_token = np.array([[0.6, 0.8]], np.float32)
    two_tokens = np.array([[1, 0], [0.8, 0.6]], np.float32)
    assert maxsim_scores(query, [one_token, two_tokens]).tolist() == pytest.approx([0.7, 0.8])
    assert maxsim_scores(one_token, [one_token]).tolist() == pytest.approx([1.0])
    assert maxsim_scores(query, []).tolist() == []


def test_a_longer_passage_beside_it_does_not_lift_a_negative_similarity():
    query = np.array([[1, 0]], np.float32)
    opposite = np.array([[-1, 0]], np.float32)
    orthogonal = np.array([[0, 1], [0, 1], [0, 1]], np.float32)
    assert maxsim_scores(query, [opposite, orthogonal]).tolist() == [-1.0, 0.0]


def test_weights_are_divided_by_their_sum():
    parts = [np.array([1, 0], np.float32), np.array([0, 1], np.float32)]
    fused = weighted_mean(parts, (3, 1))
    assert fused.tolist() == [0.75, 0.25]
    assert fused.dtype == np.float32
    assert weighted_mean(parts, (0, 2)).tolist() == [0.0, 1.0]


def test_standard_scores_have_mean_0_and_deviation_1():
    scores = standardized(np.array([0.2, 0.4, 0.9, 0.1], np.float32))
    assert scores.dtype == np.float32
    assert scores.mean() == pytest.approx(0, abs=1e-6)
    assert scores.std() == pytest.approx(1, abs=1e-6)
    assert np.argsort(scores).tolist() == [3, 0, 1, 2]
    small = np.array([1, 1 + 4e-6], np.float32)  # a spread of about twice what counts as none
    assert standardized(small).tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, 0.5], [0.3, np.nextafter(np.float32(0.3), 1)]])
def test_scores_that_differ_by_rounding_alone_say_nothing(scores):
    found = standardized(np.array(scores, np.float32))
    assert found.tolist() == [0.0] * len(scores)
    assert found.dtype == np.float32


@pytest.mark.parametrize("weights", [(0.4, 0.2, 0.4), [1, 0, 0], np.array([0, 0, 2.5]), "123"])
def test_weights_that_can_be_used(weights):
    assert checked_weights(weights) == tuple(float(weight) for weight in weights)


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (1, 1, 1, 1), (-1, 1, 1), (0, 0, 0), (1, np.nan, 1), (1, 1, np.inf), "abc", None, 1],
    ids=repr,
)
def test_weights_that_cannot_be_used_are_named(weights):
    with pytest.raises(ValueError, match="Use three numbers of 0 or more") as error:
        checked_weights(weights)
    assert str(error.value).startswith(f"The weights are {weights!r}. ")
    assert str(error.value).endswith("and ColBERT score, not all 0: (0.4, 0.2, 0.4) for example.")


def test_keys_of_scores():
    assert score_key("dense") == "bge_m3_dense_score"
    names = ("dense", "lexical", "colbert", "fused", "relevance")
    assert {score_key(name) for name in names} == SCORE_KEYS


def test_scaled_scores_of_each_fusion() -> None:
    scores = np.array([0.5, 0.9, 0.1, 0.5], np.float32)
    assert scaled(scores, "raw") is scores
    np.testing.assert_array_equal(scaled(scores, "standard"), standardized(scores))
    reciprocals = scaled(scores, "rrf")
    assert reciprocals.dtype == np.float32
    np.testing.assert_allclose(reciprocals, [1 / 62, 1 / 61, 1 / 64, 1 / 63], rtol=1e-6)


def test_products_are_those_of_numpy_with_and_without_a_model_in_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    vectors.setflags(write=False)
    with_torch = product(vectors, vectors.T), product(vectors.astype(float), vectors[0])
    monkeypatch.setitem(sys.modules, "torch", None)
    np.testing.assert_allclose(with_torch[0], product(vectors, vectors.T), rtol=1e-5)
    np.testing.assert_allclose(with_torch[1], product(vectors, vectors[0]), rtol=1e-5)
    assert with_torch[0].dtype == with_torch[1].dtype == np.float32
