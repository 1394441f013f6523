"""How often the examples say that no passage seems to answer a question, and how often rightly.

    python benchmarks/unanswered.py --data ../shared/data

Questions of XQuAD, asked of all its paragraphs, and of all but those of the article that answers.
The scores are the small model's, in float32, and the least ones those of `examples/answered.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import finish, machine, show
from quality import Texts, read, small

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._scoring import lexical_scores

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from answered import Least, least

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]

LANGUAGES = ("en", "zh")
PARAGRAPHS = 5  # of each article


def scores(embeddings: BGEM3Embeddings, texts: Texts) -> tuple[Scores, Scores]:
    """Dense and lexical scores of each paragraph for each question, `(Q, N)`."""
    passages = embeddings.encode(texts.contexts, lexical=True)
    questions = embeddings.encode(texts.questions, lexical=True, query=True)
    lexical = [lexical_scores(question, passages.lexical) for question in questions.lexical]
    return questions.dense @ passages.dense.T, np.stack(lexical)


def said(dense: Scores, lexical: Scores, limits: Least) -> dict[str, float]:
    """The share of questions that get the note, by dense scores alone and by both."""
    by_dense, by_lexical = dense.max(1) < limits.dense, lexical.max(1) < limits.lexical  # (Q,)
    return {"dense": float(by_dense.mean()), "both": float((by_dense & by_lexical).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with xquad.en.json")
    arguments = parser.parse_args()
    print(machine() + "\n")
    embeddings = BGEM3Embeddings(model=small(), device="cpu", dtype="float32", on_truncate="ignore")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for language in LANGUAGES:
        texts = read(arguments.data, language)
        dense, lexical = scores(embeddings, texts)
        limits = least(texts.questions[0], embeddings.fingerprint)
        article = np.arange(len(texts.contexts)) // PARAGRAPHS  # (N,)
        own = article[None] == article[texts.right][:, None]  # (Q, N)
        results[language] = {
            "in": said(dense, lexical, limits),
            "left out": said(*(np.where(own, -np.inf, s) for s in (dense, lexical)), limits),
        }
    rows = [
        [language, kind, *(f"{share:.1%}" for share in shares.values())]
        for language, kinds in results.items()
        for kind, shares in kinds.items()
    ]
    show(["questions", "article that answers", "by dense scores", "by both"], rows)
    finish("unanswered", results)


if __name__ == "__main__":
    main()
