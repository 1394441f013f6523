"""What travels: weights of tokens, unit length, and how encodings are put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from langchain_bge_dense._engine.encoding import (
    M3Encoding,
    Outputs,
    TextOutputs,
    Tokens,
    encoding_of,
    from_bytes,
    lexical_weights,
    normalized,
    to_bytes,
)

UNWEIGHTED = np.array([0, 1, 2, 3], np.int32)
Vectors = arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-1, 1, width=32)), max_size=30),
)
def test_a_token_has_its_largest_positive_weight(pairs: list[tuple[int, float]]) -> None:
    """As FlagEmbedding computes them, token by token."""
    expected: dict[int, float] = {}
    for token, weight in pairs:
        if token not in UNWEIGHTED and weight > expected.get(token, 0):
            expected[token] = weight
    ids = np.array([token for token, _ in pairs], np.int32)
    weights = np.array([weight for _, weight in pairs], np.float32)
    found = lexical_weights(ids, weights, UNWEIGHTED)
    assert found == expected
    assert all(type(token) is int and type(weight) is float for token, weight in found.items())


@given(Vectors)
def test_vectors_are_scaled_as_torch_does(vectors: np.ndarray) -> None:
    expected = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1).numpy()
    np.testing.assert_allclose(normalized(vectors), expected, atol=1e-6)
    assert normalized(vectors).dtype == np.float32


@given(st.tuples(*[st.booleans()] * 3), st.tuples(*[st.booleans()] * 3))
def test_outputs_of_two_callers_together_and_apart(one: tuple, other: tuple) -> None:
    both = Outputs(*one) | Outputs(*other)
    assert (both.dense, both.lexical, both.colbert) == tuple(map(max, one, other))
    everything = TextOutputs(np.zeros(2), np.zeros(3), np.zeros((2, 2)))
    selected = everything.select(Outputs(*one))
    assert tuple(output is not None for output in selected) == one


def encode(normalize: bool, **outputs: bool) -> M3Encoding:
    tokens = [Tokens(np.array([0, 7, 5, 2], np.int32), total) for total in (4, 9)]
    row = TextOutputs(
        np.array([3, 4], np.float32),
        np.array([0.5, 0.25, 0.0, 0.5], np.float32),
        np.array([[0, 2], [3, 4], [1, 0]], np.float32),
    )
    rows = [row.select(Outputs(**outputs))] * 2
    return encoding_of(
        tokens,
        rows,
        Outputs(**outputs),
        dimension=2,
        max_length=4,
        unweighted=UNWEIGHTED,
        normalize=normalize,
    )


def test_normalisation_is_of_both_kinds_of_vectors() -> None:
    scaled = encode(normalize=True, lexical=True, colbert=True)
    np.testing.assert_allclose(scaled.dense, [[0.6, 0.8]] * 2)
    np.testing.assert_allclose(scaled.colbert[1], [[0, 1], [0.6, 0.8], [1, 0]])
    assert scaled.lexical == [{7: 0.25}] * 2
    raw = encode(normalize=False, lexical=True, colbert=True)
    assert raw.dense.tolist() == [[3, 4]] * 2
    assert raw.colbert[1].tolist() == [[0, 2], [3, 4], [1, 0]]
    assert raw.lexical == scaled.lexical


def test_counts_are_those_before_the_cut() -> None:
    encoding = encode(normalize=True)
    assert encoding.token_counts.tolist() == [4, 9]
    assert encoding.truncated.tolist() == [False, True]
    assert (encoding.token_counts.dtype, encoding.truncated.dtype) == (np.int64, np.bool_)


@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize("colbert", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_not_asked_for_is_none(*, dense: bool, lexical: bool, colbert: bool) -> None:
    encoding = encode(normalize=True, dense=dense, lexical=lexical, colbert=colbert)
    assert (encoding.dense is not None) == dense
    assert (encoding.lexical is not None) == lexical
    assert (encoding.colbert is not None) == colbert


def test_the_repr_counts_and_shows_no_numbers() -> None:
    assert repr(encode(normalize=True, lexical=True, colbert=True)) == (
        "M3Encoding(2 texts, 13 tokens, 1 truncated: dense (2, 2), lexical 2 weights, "
        "colbert 6 vectors)"
    )
    assert repr(encode(normalize=True, dense=False, lexical=True)) == (
        "M3Encoding(2 texts, 13 tokens, 1 truncated: lexical 2 weights)"
    )


def same(one: M3Encoding, other: M3Encoding) -> bool:
    """Compare to the last bit, types included."""
    rows = [*zip(one.colbert or (), other.colbert or (), strict=True)]
    columns = [(getattr(one, n), getattr(other, n)) for n in ("dense", "token_counts", "truncated")]
    return all(
        np.array_equal(a, b) and getattr(a, "dtype", 0) == getattr(b, "dtype", 0)
        for a, b in [*columns, *rows]
        if a is not None or b is not None
    ) and (one.lexical, one.colbert is None) == (other.lexical, other.colbert is None)


@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize("colbert", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_bytes_keep_every_bit(*, dense: bool, lexical: bool, colbert: bool) -> None:
    encoding = encode(normalize=True, dense=dense, lexical=lexical, colbert=colbert)
    assert same(from_bytes([to_bytes(encoding)]), encoding)


def test_replies_of_one_call_are_joined_in_their_order() -> None:
    """Of texts with no weights and no vectors, too."""
    first = encode(normalize=True, lexical=True, colbert=True)
    empty = replace(
        first,
        lexical=[{}, {9: 0.125, 4: 0.5}],
        colbert=[np.zeros((0, 2), np.float32), np.float32([[5, 6]])],
        truncated=np.array([True, True]),
    )
    joined = from_bytes([to_bytes(first), to_bytes(empty)])
    assert same(
        joined,
        M3Encoding(
            np.concatenate([first.dense, empty.dense]),
            [*first.lexical, *empty.lexical],
            [*first.colbert, *empty.colbert],
            np.array([4, 9, 4, 9]),
            np.array([False, True, True, True]),
        ),
    )
