"""`BGEM3Reranker` against `BGEM3FlagModel.compute_score`, and what it does to documents."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_core.documents import Document
from pydantic import ValidationError
from reference import flag_model

from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker

if TYPE_CHECKING:
    from pathlib import Path

QUERY = "equal rights"
TEXTS = ["a brown fox", "equal in dignity and rights", "", "人人有权享有生命", "equal rights"]


def documents() -> list[Document]:
    return [Document(text, id=str(i), metadata={"row": i}) for i, text in enumerate(TEXTS)]


def test_scores_equal_flagembeddings(tiny: BGEM3Embeddings, tiny_checkpoint: Path) -> None:

    flag = flag_model(tiny_checkpoint)
    expected = flag.compute_score(
        [(QUERY, text) for text in TEXTS], weights_for_different_modes=[0.4, 0.2, 0.4]
    )
    ranked = BGEM3Reranker(embeddings=tiny).compress_documents(documents(), QUERY)
    assert len(ranked) == len(TEXTS)
    names = {"relevance": "colbert+sparse+dense", "dense": "dense", "lexical": "sparse"}
    for document in ranked:
        row = document.metadata["row"]
        for ours, theirs in {**names, "colbert": "colbert"}.items():
            assert document.metadata[f"bge_m3_{ours}_score"] == pytest.approx(
                expected[theirs][row], abs=1e-5
            )
    order = np.argsort(expected["colbert+sparse+dense"])[::-1].tolist()
    assert [document.metadata["row"] for document in ranked] == order


def test_documents_are_copied_not_changed(tiny: BGEM3Embeddings) -> None:
    given = documents()
    ranked = BGEM3Reranker(embeddings=tiny, top_n=2).compress_documents(given, QUERY)
    assert given == documents()
    assert ranked[0].id == "4"
    assert len(ranked) == 2
    assert type(ranked[0].metadata["bge_m3_relevance_score"]) is float


def test_async_equals_sync(tiny: BGEM3Embeddings) -> None:
    reranker = BGEM3Reranker(embeddings=tiny, top_n=3, weights=(0.1, 0.8, 0.1))
    ranked = asyncio.run(reranker.acompress_documents(documents(), QUERY))
    assert ranked == reranker.compress_documents(documents(), QUERY)
    assert len(ranked) == 3
    assert ranked != BGEM3Reranker(embeddings=tiny, top_n=3).compress_documents(documents(), QUERY)


def test_the_querys_instruction_counts(tiny: BGEM3Embeddings) -> None:
    instructed = tiny.model_copy(update={"query_instruction": "find: "})
    ranked = BGEM3Reranker(embeddings=instructed).compress_documents(documents(), QUERY)
    assert ranked == BGEM3Reranker(embeddings=tiny).compress_documents(
        documents(), f"find: {QUERY}"
    )


def test_no_documents_give_none(tiny: BGEM3Embeddings) -> None:
    assert BGEM3Reranker(embeddings=tiny).compress_documents([], QUERY) == []


def test_it_drops_into_a_compression_retriever(tiny: BGEM3Embeddings) -> None:
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.retrievers import BaseRetriever

    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return documents()

    reranker = BGEM3Reranker(embeddings=tiny, top_n=1)
    retriever = ContextualCompressionRetriever(
        base_retriever=Everything(), base_compressor=reranker
    )
    assert [document.id for document in retriever.invoke(QUERY)] == ["4"]


@pytest.mark.parametrize("weights", [(1, 1), (1, -1, 0), (0, 0, 0), "abc", None, (1, 2, "x")])
def test_impossible_weights_are_named(tiny: BGEM3Embeddings, weights: Any) -> None:
    with pytest.raises(ValidationError, match="Use three numbers of 0 or more"):
        BGEM3Reranker(embeddings=tiny, weights=weights)


def test_top_n_below_one_is_refused(tiny: BGEM3Embeddings) -> None:
    with pytest.raises(ValidationError, match="top_n"):
        BGEM3Reranker(embeddings=tiny, top_n=0)


def test_a_dense_only_checkpoint_takes_dense_weights_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "dense-only")
    (folder / "colbert_linear.pt").unlink()
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="dense-only checkpoint"):
        BGEM3Reranker(embeddings=embeddings).compress_documents(documents(), QUERY)
    reranker = BGEM3Reranker(embeddings=embeddings, weights=(1, 0, 0))
    [best, *_] = reranker.compress_documents(documents(), QUERY)
    assert best.metadata.keys() == {"row", "bge_m3_relevance_score", "bge_m3_dense_score"}
