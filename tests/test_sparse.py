"""Lexical weights in the real embedded engines of Qdrant and Milvus, hybrid queries included."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from langchain_bge_dense.sparse import BGEM3MilvusSparse, BGEM3QdrantSparse

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_bge_dense import BGEM3Embeddings

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

    def counted(batch: list, signals: object) -> object:
        seen.append(len(batch))
        return forward(batch, signals)

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


def test_the_same_side_twice_is_computed_twice(
    embeddings: BGEM3Embeddings, passes: list[int]
) -> None:
    BGEM3QdrantSparse(embeddings)
    assert embeddings.embed_documents(["a"]) == embeddings.embed_documents(["a"])
    assert passes == [1, 1]


def test_an_empty_text_has_no_weights(embeddings: BGEM3Embeddings) -> None:
    assert BGEM3QdrantSparse(embeddings).embed_query("").indices == []
    assert BGEM3MilvusSparse(embeddings).embed_documents([""]) == [{}]


@pytest.mark.parametrize(
    ("name", "extra"), [("BGEM3QdrantSparse", "qdrant"), ("BGEM3MilvusSparse", "milvus")]
)
def test_a_missing_extra_is_named(name: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules['langchain_{extra}'] = None\n"
        f"from langchain_bge_dense import sparse\n"
        f"try:\n    sparse.{name}\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'pip install "langchain-bge-dense[{extra}]"' in done.stdout
