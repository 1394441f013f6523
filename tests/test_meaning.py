"""Retrieval with the small real model: do the numbers mean what they should?

As a task: rank the 240 English paragraphs of XQuAD for each of its 1,190 questions; the question's
own paragraph is the right one. The expected figures are those of sentence-transformers in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from langchain_bge_dense import BGEM3Embeddings, M3Encoding

XQUAD = Path(__file__).parents[2] / "shared" / "data" / "xquad.en.json"
TOLERANCE = 0.003


class Task(NamedTuple):
    passages: list[str]
    questions: list[str]
    answers: NDArray[np.int64]  # each question's passage
    encoded_passages: M3Encoding
    encoded_questions: M3Encoding


class Quality(NamedTuple):
    first: float
    in_ten: float
    reciprocal_rank: float


@pytest.fixture(scope="module")
def task(small: BGEM3Embeddings) -> Task:
    if not XQUAD.exists():
        pytest.skip(f"XQuAD is not at {XQUAD}")
    articles = json.loads(XQUAD.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    passages = [paragraph["context"] for paragraph in paragraphs]
    pairs = [(qa["question"], i) for i, p in enumerate(paragraphs) for qa in p["qas"]]
    questions = [question for question, _ in pairs]
    answers = np.array([answer for _, answer in pairs])
    with pytest.warns(UserWarning, match="512"):  # the longest passages are cut there
        encoded_passages = small.encode(passages, lexical=True, colbert=True)
    encoded_questions = small.encode(questions, lexical=True, colbert=True)
    return Task(passages, questions, answers, encoded_passages, encoded_questions)


def quality(scores: NDArray[np.float32], answers: NDArray[np.int64]) -> Quality:
    right = np.take_along_axis(scores, answers[:, None], axis=1)  # (Q, 1)
    ranks = (scores > right).sum(axis=1)  # (Q,): passages ahead of the right one
    return Quality((ranks < 1).mean(), (ranks < 10).mean(), (1 / (ranks + 1)).mean())


def dense_scores(task: Task) -> NDArray[np.float32]:
    return task.encoded_questions.dense @ task.encoded_passages.dense.T  # (Q, P)


def lexical_scores(task: Task) -> NDArray[np.float32]:
    questions, passages = (
        spread(each.lexical) for each in (task.encoded_questions, task.encoded_passages)
    )
    return questions @ passages.T  # (Q, P)


def maxsim_scores(task: Task, chosen: slice) -> NDArray[np.float32]:
    passages = task.encoded_passages.colbert
    tokens = np.concatenate(passages).T  # (D, T): of all passages, one after the other
    starts = np.cumsum([0, *map(len, passages[:-1])])  # (P,)
    questions = task.encoded_questions.colbert[chosen]
    best = (np.maximum.reduceat(question @ tokens, starts, axis=1) for question in questions)
    return np.array([similar.mean(axis=0) for similar in best])  # (Q, P)


def spread(weights: list[dict[int, float]]) -> NDArray[np.float32]:
    matrix = np.zeros((len(weights), 30522), dtype=np.float32)  # (N, V)
    for row, each in zip(matrix, weights, strict=True):
        row[list(each)] = list(each.values())
    return matrix


def test_dense_retrieval_is_as_good_as_the_reference(task: Task) -> None:
    found = quality(dense_scores(task), task.answers)
    assert found == pytest.approx((0.8874, 0.9908, 0.9303), abs=TOLERANCE)


def test_lexical_retrieval_is_as_good_alone(task: Task) -> None:
    found = quality(lexical_scores(task), task.answers)
    assert found.first > 0.87
    assert found.in_ten > 0.98


def test_both_together_beat_each_alone(task: Task) -> None:
    dense, lexical = dense_scores(task), lexical_scores(task)
    both = quality(dense + 0.3 * lexical, task.answers)
    assert both.first > 0.94
    assert both.in_ten > 0.998


def test_colbert_beats_dense(task: Task) -> None:
    some = slice(None, None, 8)
    answers = task.answers[some]
    colbert = quality(maxsim_scores(task, some), answers)
    dense = quality(dense_scores(task)[some], answers)
    assert colbert.first > dense.first + 0.03
    assert colbert.reciprocal_rank > dense.reciprocal_rank + 0.02


def test_vectors_equal_those_of_sentence_transformers(small_checkpoint: Path, task: Task) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(small_checkpoint), device="cpu")
    reference.max_seq_length = 512
    sample = task.passages[::8] + task.questions[::40]
    ours = np.concatenate([task.encoded_passages.dense[::8], task.encoded_questions.dense[::40]])
    np.testing.assert_allclose(ours, reference.encode(sample), rtol=0, atol=1e-6)
