"""ColBERT vectors in few bits against the vectors that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from langchain_bge_dense import _codes
from langchain_bge_dense._codes import KINDS, Codec, check_kind, colbert_windows, pooled
from langchain_bge_dense._scoring import maxsim_scores

if TYPE_CHECKING:
    from langchain_bge_dense import BGEM3Embeddings
    from langchain_bge_dense._codes import Kind

# Lowest cosine to random vectors of 256 dimensions, and bits a dimension.
COSINES = {"1bit": 0.7, "2bit": 0.9, "int8": 0.9998}
BITS = {"1bit": 1, "2bit": 2, "int8": 8}


def unit(count: int, dimension: int = 256, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def codec(kind: Kind, dimension: int = 256, pooling: int = 1) -> Codec:
    return Codec(kind, pooling, 0.3 * unit(1, dimension, seed=9)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_close_small_and_without_bias(kind: Kind) -> None:
    vectors = unit(60)
    codes = codec(kind).compress(vectors)
    assert len(codes) == 1 + 60 * (2 + 256 * BITS[kind] // 8)
    found = codec(kind).decompress(codes)
    norms = np.linalg.norm(found, axis=1)
    assert ((vectors * found).sum(axis=1) / norms).min() > COSINES[kind]
    # A residual's product with itself is right, whatever the code lost.
    residuals = vectors - codec(kind).mean
    kept = ((found - codec(kind).mean) * residuals).sum(axis=1)
    np.testing.assert_allclose(kept, np.square(residuals).sum(axis=1), rtol=2e-3)


@given(
    kind=st.sampled_from(KINDS),
    dimension=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    queries=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 2_048]),
    seed=st.integers(0, 99),
)
def test_scores_are_maxsim_over_what_the_codes_say(  # noqa: PLR0917
    kind: Kind, dimension: int, lengths: list[int], queries: int, chunk: int, seed: int
) -> None:
    made = codec(kind, dimension)
    passages = [made.compress(unit(n, dimension, seed + n)) for n in lengths]
    query = unit(queries, dimension, seed)
    expected = maxsim_scores(query, [made.decompress(codes) for codes in passages])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("langchain_bge_dense._codes._CHUNK", chunk)
        np.testing.assert_allclose(made.maxsim(query, passages), expected, atol=2e-5, rtol=1e-4)


def test_no_passages_have_no_scores() -> None:
    made = codec("1bit")
    for passages in ([], [made.compress(unit(2))]):
        scores = made.maxsim(unit(3), passages)
        assert (scores.shape, scores.dtype) == ((len(passages),), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_coded_by_itself(kind: Kind) -> None:
    made = codec(kind)
    vectors = unit(5) * np.array([[1], [2], [30], [4], [0.5]], np.float32)
    alone = [made.decompress(made.compress(vectors[row : row + 1])) for row in range(5)]
    np.testing.assert_array_equal(made.decompress(made.compress(vectors)), np.concatenate(alone))
    assert alone[0].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_that_is_the_mean_stays_so(kind: Kind) -> None:
    made = codec(kind)
    found = made.decompress(made.compress(np.stack([made.mean, unit(1)[0]])))
    np.testing.assert_allclose(found[0], made.mean, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_others_are_refused(kind: Kind) -> None:
    made = codec(kind)
    made.check(made.compress(unit(7)))
    for other in {*KINDS} - {kind}:
        with pytest.raises(ValueError, match=f"not of '{kind}' and 256 dimensions"):
            made.check(codec(other).compress(unit(7)))
    with pytest.raises(ValueError, match="bytes are not of"):
        made.check(codec(kind, 64).compress(unit(7, 64)))
    with pytest.raises(ValueError, match="of 0 bytes"):
        made.check(b"")


class TestPooling:
    def test_equal_tokens_become_one(self) -> None:
        vectors = unit(3)
        found = pooled(np.repeat(vectors, 2, axis=0), 2)
        order = (found @ vectors.T).argmax(axis=1)
        assert sorted(order.tolist()) == [0, 1, 2]
        np.testing.assert_allclose(found, vectors[order], atol=1e-6)

    @pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 2), (3, 1), (40, 20), (1_100, 549)])
    def test_half_of_the_vectors_are_left_and_have_unit_length(self, count: int, kept: int) -> None:
        found = pooled(unit(count), 2)
        assert found.shape == (kept, 256)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)

    def test_vectors_that_are_not_normalised_keep_their_length(self) -> None:
        vectors = unit(40)
        np.testing.assert_allclose(pooled(7 * vectors, 2), 7 * pooled(vectors, 2), atol=1e-6)

    def test_clusters_are_wards(self) -> None:
        vectors = unit(30)
        labels = fcluster(linkage(vectors.astype(float), "ward"), 10, "maxclust")
        sums = np.stack([vectors[labels == label].sum(axis=0) for label in range(1, 11)])
        expected = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        found = pooled(vectors, 3)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.dtype == np.float32

    def test_without_pooling_they_stay(self) -> None:
        vectors = unit(5)
        assert pooled(vectors, 1) is vectors

    def test_it_is_part_of_the_codes(self) -> None:
        vectors = unit(40)
        found = codec("int8", pooling=2).decompress(codec("int8", pooling=2).compress(vectors))
        np.testing.assert_allclose(found, pooled(vectors, 2), atol=2e-3)


def test_a_models_codec_is_the_same_wherever_it_is_made(tiny: BGEM3Embeddings) -> None:
    one, other = Codec.of(tiny, "2bit", 3), Codec.of(tiny)
    assert (one.kind, one.pooling, other.kind, other.pooling) == ("2bit", 3, "1bit", 1)
    np.testing.assert_array_equal(one.mean, other.mean)
    vectors = np.concatenate(tiny.encode(_codes._SENTENCES, dense=False, colbert=True).colbert)
    np.testing.assert_array_equal(one.mean, vectors.mean(axis=0).astype(np.float16))
    instructed = tiny.model_copy(update={"document_instruction": "passage: "})
    np.testing.assert_array_equal(Codec.of(instructed).mean, one.mean)
    short = tiny.model_copy(update={"max_length": 8, "on_truncate": "raise"})
    assert Codec.of(short).mean @ one.mean > 0.9 * np.square(one.mean).sum()
    assert 0.01 < np.linalg.norm(one.mean) < 1
    assert one.mean.dtype == np.float32


def test_texts_fit_into_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_codes, "_CHARACTERS", 10)
    found = colbert_windows([None, "x" * 6, "x" * 10, "x" * 11, "", "x"])
    assert [[len(str(text)) for text in run] for run in found] == [[4, 6], [10], [11], [0, 1]]


@pytest.mark.parametrize(("kind", "pooling"), [("4bit", 1), (True, 1), (1, 1), ("1bit", 0)])
def test_kinds_that_there_are_not(kind: object, pooling: int) -> None:
    message = f"^colbert={kind!r} with colbert_pooling={pooling} is not supported\\. Use"
    with pytest.raises(
        ValueError, match=f"{message} one of '1bit', '2bit', 'int8', and a pooling of 1 or more"
    ):
        check_kind(kind, pooling)


def test_kinds_that_there_are() -> None:
    for kind in KINDS:
        check_kind(kind, 1)
