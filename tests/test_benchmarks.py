"""The retrieval benchmark: its files, its measures, and its fusion against the retriever's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from beir_format import RetrievalSet, measures, write
from candidates import FUSIONS, Candidates, Setting, rankings
from retrieval import filled

from langchain_bge_dense import BGEM3Retriever

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_bge_dense import BGEM3Embeddings

WORDS = ("equal", "rights", "freedom", "life", "liberty", "dignity", "reason", "自由", "平等")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "letters", ["eins", "zwei", "drei"], ["two?", "two again?", "三?"], [1, 1, 2])
    texts = RetrievalSet.read(tmp_path / "letters")
    assert texts.name == "letters"
    assert texts.queries == {"q0": "two?", "q1": "two again?", "q2": "三?"}
    assert texts.relevant == {"q0": {"p1": 1}, "q1": {"p1": 1}, "q2": {"p2": 1}}
    assert [(d.id, d.page_content) for d in texts.documents()] == [
        ("p0", "eins"),
        ("p1", "zwei"),
        ("p2", "drei"),
    ]


def test_titles_come_first_and_queries_of_other_splits_are_left_out(tmp_path: Path) -> None:
    corpus = [{"_id": 7, "title": "A title", "text": "a text"}, {"_id": "8", "text": "alone"}]
    queries = [{"_id": "a", "text": "one"}, {"_id": "b", "text": "other"}]
    for name, entries in {"corpus": corpus, "queries": queries}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)), "utf-8")
    (tmp_path / "qrels").mkdir()
    judgements = "query-id\tcorpus-id\tscore\nb\t7\t2\nb\t8\t0\n"
    (tmp_path / "qrels" / "dev.tsv").write_text(judgements, "utf-8")
    texts = RetrievalSet.read(tmp_path, "dev")
    assert texts.queries == {"b": "other"}
    assert texts.relevant == {"b": {"7": 2, "8": 0}}
    assert {d.id: d.page_content for d in texts.documents()} == {
        "7": "A title a text",
        "8": "alone",
    }


def test_measures_are_means_over_all_queries() -> None:
    relevant = {"a": {"x": 1}, "b": {"y": 1, "z": 1}, "c": {"x": 1}}
    found = measures(relevant, {"a": ["x", "y"], "b": ["x", "y"], "c": []})
    second = 1 / np.log2(3)  # the gain at rank 2
    assert found == pytest.approx(
        {
            "nDCG@10": (1 + second / (1 + second)) / 3,
            "R@1": 1 / 3,
            "R@10": (1 + 1 / 2) / 3,
            "R@100": (1 + 1 / 2) / 3,
            "MRR@10": (1 + 1 / 2) / 3,
        }
    )


@pytest.mark.parametrize("weights", [(1, 0, 0), (0.4, 0.2, 0), (0, 0, 1), (0.4, 0.2, 1)])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_study_orders_candidates_as_the_retriever_does(
    tiny: BGEM3Embeddings, tmp_path: Path, fusion: str, weights: tuple[float, ...]
) -> None:
    chooser = np.random.default_rng(0)
    passages = [" ".join(chooser.choice(WORDS, 8)) for _ in range(120)]
    write(tmp_path / "set", passages, passages[::40], range(0, 120, 40))
    texts = RetrievalSet.read(tmp_path / "set")
    with filled(tiny, texts) as (store, _):
        candidates = Candidates.of(store, list(texts.queries.values()))
        retriever = BGEM3Retriever(
            vectorstore=store, k=10, weights=weights, fusion=fusion, colbert=True, colbert_k=20
        )
        found = {
            query: [document.id for document in retriever.invoke(text)]
            for query, text in texts.queries.items()
        }
    setting = Setting(fusion, 20, weights)
    assert rankings(texts, candidates, setting, 10) == found
