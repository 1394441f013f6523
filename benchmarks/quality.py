"""R@1, R@10 and MRR on the XQuAD files for every dtype.

    python benchmarks/quality.py --data ../shared/data
    python benchmarks/quality.py --data ../shared/data --model BAAI/bge-m3 --languages en zh-en

Every paragraph is embedded, every question is, and the question's own paragraph is the right one.
`zh-en` asks Chinese questions of English paragraphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import finish, machine, show

from langchain_bge_dense import BGEM3Embeddings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

DTYPES = ("float32", "bfloat16", "int8")
LANGUAGES = ("en", "zh", "de", "ru", "ar", "th", "en-zh", "zh-en")
COLUMNS = ("R@1", "R@10", "MRR", "cosine")


class Texts(NamedTuple):
    contexts: list[str]
    questions: list[str]
    right: list[int]  # each question's context


class Vectors(NamedTuple):
    contexts: np.ndarray  # (N, D)
    questions: np.ndarray  # (Q, D)


def read(data: Path, languages: str) -> Texts:
    """Read questions in one language and contexts in the same or another, such as `zh-en`."""
    first, last = (paragraphs(data, language) for language in ends(languages))
    questions = [(qa["question"], i) for i, p in enumerate(first) for qa in p["qas"]]
    return Texts([p["context"] for p in last], *map(list, zip(*questions, strict=True)))


def paragraphs(data: Path, language: str) -> list[dict]:
    entries = json.loads((data / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    return [paragraph for entry in entries for paragraph in entry["paragraphs"]]


def ends(languages: str) -> tuple[str, str]:
    """The languages of the questions and of the contexts."""
    first, _, last = languages.partition("-")
    return first, last or first


def ranks_of(scores: np.ndarray, right: list[int]) -> np.ndarray:
    """Rank of the right context for each question, from 1; `(Q, N)` scores."""
    own = scores[np.arange(len(right)), right][:, None]
    return 1 + (scores > own).sum(axis=1)


def measures(ranks: np.ndarray) -> dict[str, float]:
    return {
        "R@1": float((ranks == 1).mean()),
        "R@10": float((ranks <= 10).mean()),
        "MRR": float((1 / ranks).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with xquad.en.json")
    parser.add_argument("--model", help="a checkpoint; without it, the small model of the examples")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES)
    arguments = parser.parse_args()
    model = arguments.model or small()
    print(machine() + "\n")
    texts = {languages: read(arguments.data, languages) for languages in arguments.languages}
    results = compare(model, texts)
    rows = [
        [languages, dtype, *(f"{values[column]:.4f}" for column in COLUMNS)]
        for languages, by_dtype in results.items()
        for dtype, values in by_dtype.items()
    ]
    show(["questions-paragraphs", "dtype", *COLUMNS[:3], "lowest cosine to float32"], rows)
    finish("quality", results)


def small() -> str:
    from small_model import build

    return str(build())


def compare(model: str, texts: dict[str, Texts]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by languages, by dtype."""
    results: dict[str, dict[str, dict[str, float]]] = {languages: {} for languages in texts}
    exact: dict[str, Vectors] = {}
    for dtype in DTYPES:
        found = encode(model, texts, dtype)
        exact = exact or found
        for languages, vectors in found.items():
            scores = vectors.questions @ vectors.contexts.T  # (Q, N)
            cosines = (
                (one * other).sum(axis=1).min()
                for one, other in zip(vectors, exact[languages], strict=True)
            )
            figures = measures(ranks_of(scores, texts[languages].right))
            results[languages][dtype] = {**figures, "cosine": float(min(cosines))}
    return results


def encode(model: str, texts: dict[str, Texts], dtype: str) -> dict[str, Vectors]:
    """Embed what differs once."""
    embeddings = BGEM3Embeddings(model=model, device="cpu", dtype=dtype, on_truncate="ignore")
    known: dict[tuple[str, bool], np.ndarray] = {}
    result = {}
    for languages, (contexts, questions, _) in texts.items():
        first, last = ends(languages)
        for key, chosen in (((last, False), contexts), ((first, True), questions)):
            if key not in known:
                known[key] = embeddings.encode(chosen, query=key[1]).dense
        result[languages] = Vectors(known[last, False], known[first, True])
    embeddings.close()
    return result


if __name__ == "__main__":
    main()
