"""Lexical weights in the real embedded engines of Qdrant and Milvus, hybrid queries included."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.sparse import BGEM3MilvusSparse, BGEM3QdrantSparse

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [
    "The pump is switched on by the valve in the cellar.",
    "Spare part QX-7731 fits the older model.",
    "Spare part ZB-2204 fits the newer model.",
    "Water the garden in the evening.",
]
PART = "ZB-2204"


@pytest.fixture
def embeddings(small: BGEM3Embeddings) -> BGEM3Embeddings:
    """An instance of its own, as sparse embeddings change what their partner keeps."""
    return small.model_copy()


@pytest.fixture
def passes(embeddings: BGEM3Embeddings) -> list[int]:
    """Texts of each forward pass."""
    encoder = embeddings.load()._engine.encoder
    seen: list[int] = []
    forward = encoder.forward

    def counted(batch: list, outputs: object) -> object:
        seen.append(len(batch))
        return forward(batch, outputs)

    encoder.forward = counted
    yield seen
    del encoder.forward


@pytest.mark.parametrize("mode", ["HYBRID", "SPARSE"])
def test_qdrant_finds_a_part_number(
    embeddings: BGEM3Embeddings, mode: str, passes: list[int]
) -> None:
    from langchain_qdrant import QdrantVectorStore, RetrievalMode

    store = QdrantVectorStore.from_texts(
        TEXTS,
        embeddings,
        sparse_embedding=BGEM3QdrantSparse(embeddings),
        retrieval_mode=RetrievalMode[mode],
        location=":memory:",
        validate_collection_config=False,
    )
    assert store.similarity_search(PART, k=1)[0].page_content == TEXTS[2]
    store.client.close()
    assert sum(passes) <= len(TEXTS) + 1 + 1  # texts, query, Qdrant's probe for the width


def test_milvus_finds_a_part_number(
    embeddings: BGEM3Embeddings, tmp_path: Path, passes: list[int]
) -> None:
    from langchain_milvus import Milvus
    from pymilvus import Function, FunctionType

    store = Milvus.from_texts(
        TEXTS,
        [embeddings, BGEM3MilvusSparse(embeddings)],
        vector_field=["dense", "sparse"],
        index_params=[
            {"index_type": "FLAT", "metric_type": "COSINE"},
            {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP"},
        ],
        # langchain-milvus's own default drops small weights, which Milvus Lite does not do.
        search_params=[{"metric_type": "COSINE"}, {"metric_type": "IP"}],
        connection_args={"uri": str(tmp_path / "milvus.db")},
        consistency_level="Strong",
    )
    fusion = Function(
        name="fusion",
        function_type=FunctionType.RERANK,
        input_field_names=[],
        params={"reranker": "weighted", "weights": [0.5, 0.5]},
    )
    found = store.similarity_search(PART, k=1, reranker=fusion)
    assert found[0].page_content == TEXTS[2]
    assert sum(passes) == len(TEXTS) + 1


@pytest.mark.parametrize("sparse", [BGEM3QdrantSparse, BGEM3MilvusSparse])
def test_both_sides_encode_once_in_either_order(
    embeddings: BGEM3Embeddings, passes: list[int], sparse: type
) -> None:
    side = sparse(embeddings)
    dense = embeddings.embed_documents(TEXTS)
    weights = side.embed_documents(TEXTS)
    side.embed_query(PART)
    query = embeddings.embed_query(PART)
    assert sum(passes) == len(TEXTS) + 1
    fresh = embeddings.model_copy()
    assert dense == fresh.embed_documents(TEXTS)
    assert query == fresh.embed_query(PART)
    expected = fresh.encode(TEXTS, dense=False, lexical=True).lexical
    if sparse is BGEM3QdrantSparse:
        weights = [dict(zip(w.indices, w.values, strict=True)) for w in weights]
    assert weights == expected


async def test_filling_a_hybrid_milvus_from_an_event_loop_runs_every_passage_once(
    embeddings: BGEM3Embeddings, tmp_path: Path, passes: list[int]
) -> None:
    from langchain_milvus import Milvus

    store = Milvus(
        [embeddings, BGEM3MilvusSparse(embeddings)],
        vector_field=["dense", "sparse"],
        index_params=[
            {"index_type": "FLAT", "metric_type": "COSINE"},
            {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP"},
        ],
        connection_args={"uri": str(tmp_path / "milvus.db")},
        auto_id=True,
    )
    await store.aadd_texts(TEXTS)
    assert sum(passes) == len(TEXTS)


async def test_filling_a_hybrid_qdrant_from_an_event_loop_runs_every_passage_once(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    from langchain_qdrant import QdrantVectorStore, RetrievalMode

    store = await QdrantVectorStore.afrom_texts(
        TEXTS,
        embeddings,
        sparse_embedding=BGEM3QdrantSparse(embeddings),
        retrieval_mode=RetrievalMode.HYBRID,
        location=":memory:",
        validate_collection_config=False,
    )
    store.client.close()
    assert sum(passes) == len(TEXTS) + 1  # and Qdrant's probe for the width


async def test_async_sides_encode_once_in_either_order(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    side = BGEM3MilvusSparse(embeddings)
    dense, weights = await embeddings.aembed_documents(TEXTS), await side.aembed_documents(TEXTS)
    query_weights, query = await side.aembed_query(PART), await embeddings.aembed_query(PART)
    assert sum(passes) == len(TEXTS) + 1
    fresh = embeddings.model_copy()
    np.testing.assert_allclose(dense, fresh.embed_documents(TEXTS), atol=1e-6)
    np.testing.assert_allclose(query, fresh.embed_query(PART), atol=1e-6)
    assert [set(each) for each in [*weights, query_weights]] == [
        set(each) for each in fresh.encode([*TEXTS, PART], lexical=True).lexical
    ]


def test_the_instruction_tells_encodings_apart(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    """A question that is a passage, too, is encoded with each of the two instructions."""
    told = embeddings.model_copy(update={"query_instruction": "find the spare part: "})
    side = BGEM3MilvusSparse(told)
    dense = told.embed_documents([PART])[0]
    weights = side.embed_query(PART)
    plain = embeddings.model_copy()
    assert sum(passes) == 2
    np.testing.assert_allclose(dense, plain.embed_query(PART), atol=1e-6)
    assert weights.keys() == (
        plain.encode([f"find the spare part: {PART}"], lexical=True).lexical[0].keys()
    )


@pytest.mark.parametrize(
    "change",
    [{"max_length": 8}, {"normalize": False}, {"document_instruction": "text: "}],
    ids=lambda change: next(iter(change)),
)
def test_instances_with_other_settings_share_a_model_and_no_encodings(
    embeddings: BGEM3Embeddings, change: dict[str, object]
) -> None:
    other = embeddings.model_copy(update={**change, "on_truncate": "ignore"})
    embeddings = embeddings.model_copy(update={"on_truncate": "ignore"})
    expected = other.embed_documents(TEXTS)
    BGEM3MilvusSparse(embeddings).embed_documents(TEXTS)
    BGEM3MilvusSparse(other)
    np.testing.assert_allclose(other.embed_documents(TEXTS), expected, atol=1e-6)


def test_a_refusal_is_of_who_asked_for_it(embeddings: BGEM3Embeddings) -> None:
    lenient = embeddings.model_copy(update={"max_length": 8, "on_truncate": "ignore"})
    strict = lenient.model_copy(update={"on_truncate": "raise"})
    BGEM3MilvusSparse(lenient).embed_documents(TEXTS)
    BGEM3MilvusSparse(strict)
    with pytest.raises(ValueError, match="Text 0 has"):
        strict.embed_documents(TEXTS)


def test_encodings_of_eight_calls_wait_for_their_other_half(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    side = BGEM3MilvusSparse(embeddings)
    calls = [[f"{text} {number}" for text in TEXTS[:2]] for number in range(9)]
    for call in calls:
        embeddings.embed_documents(call)
    assert sum(passes) == 18
    assert len(embeddings._pairs._kept) == 8
    for call in calls[1:]:
        side.embed_documents(call)
    assert sum(passes) == 18
    assert not embeddings._pairs._kept
    side.embed_documents(calls[0])
    assert sum(passes) == 20


@pytest.mark.parametrize("texts", [list, iter])
def test_a_stream_is_no_half_of_a_pair(embeddings: BGEM3Embeddings, texts: type) -> None:
    side = BGEM3MilvusSparse(embeddings)
    expected = embeddings.model_copy().encode(TEXTS, lexical=True)
    side.embed_documents(TEXTS)
    vectors = list(embeddings.embed_stream(texts(TEXTS)))
    np.testing.assert_allclose(vectors, expected.dense, atol=1e-6)
    assert [each.keys() for each in side.embed_documents(TEXTS)] == [
        each.keys() for each in expected.lexical
    ]


def test_a_dense_only_checkpoint_keeps_its_dense_side(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "dense-only")
    (folder / "sparse_linear.pt").unlink()
    dense = BGEM3Embeddings(model=folder, device="cpu", dtype="float32")
    side = BGEM3MilvusSparse(dense)
    with pytest.raises(ValueError, match="is a dense-only checkpoint"):
        side.embed_query("free")
    assert len(dense.embed_query("free")) == len(dense.embed_documents(["free"])[0]) == 32


def test_the_same_side_twice_is_computed_twice(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    BGEM3QdrantSparse(embeddings)
    assert embeddings.embed_documents(["a"]) == embeddings.embed_documents(["a"])
    assert passes == [1, 1]


def test_an_empty_text_has_no_weights(embeddings: BGEM3Embeddings) -> None:
    assert BGEM3QdrantSparse(embeddings).embed_query("").indices == []
    assert BGEM3MilvusSparse(embeddings).embed_query("") == {}


@pytest.mark.parametrize("weightless", ["\u200b", ""])
def test_milvus_takes_texts_without_weights_and_their_words_find_others(
    embeddings: BGEM3Embeddings, tmp_path: Path, weightless: str
) -> None:
    from langchain_milvus import Milvus

    assert embeddings.encode([weightless], lexical=True).lexical == [{}]
    store = Milvus.from_texts(
        [weightless, *TEXTS],
        BGEM3MilvusSparse(embeddings),
        vector_field="sparse",
        index_params={"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP"},
        search_params={"metric_type": "IP"},
        connection_args={"uri": str(tmp_path / "milvus.db")},
        consistency_level="Strong",
    )
    (best, score), *others = store.similarity_search_with_score(PART, k=5)
    assert best.page_content == TEXTS[2]
    assert score > 0
    assert [found for found, score in others if found.page_content == weightless and score] == []
    store.similarity_search(weightless, k=1)
