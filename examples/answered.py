"""Whether a passage seems to answer a question, by scores that were measured for each model.

`benchmarks/unanswered.py` prints how often that is right, on XQuAD.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from display import CJK
from langchain_core.documents import Document

NOTHING = "No passage seems to answer this."


class Least(NamedTuple):
    """The scores of which a passage that answers has at least one."""

    dense: float
    lexical: float


# By model: for questions in Chinese, and in other languages.
LEAST = {"small-m3": (Least(0.87, 0.6), Least(0.825, 0.8))}


def least(question: str, fingerprint: str) -> Least:
    """Give the least scores for a question; passages of a model not measured have them all."""
    known = (scores for name, scores in LEAST.items() if fingerprint.startswith(name))
    return next(known, (Least(-1, 0),) * 2)[0 if re.search(f"[{CJK}]", question) else 1]


def seems_answered(question: str, passages: Iterable[Document], fingerprint: str) -> bool:
    """Compare the scores that `BGEM3Retriever(scores=True)` gave; lexical ones where they are."""
    dense, lexical = least(question, fingerprint)
    return any(
        passage.metadata["bge_m3_dense_score"] >= dense
        or passage.metadata.get("bge_m3_lexical_score", -1) >= lexical
        for passage in passages
    )
