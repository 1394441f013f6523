"""R@1, R@10 and MRR on the XQuAD files for every dtype.

    python benchmarks/quality.py --data ../shared/data
    python benchmarks/quality.py --data ../shared/data --model BAAI/bge-m3 --languages en zh

Every paragraph is embedded, every question is, and the question's own paragraph is the right one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from common import finish, machine, show

from langchain_bge_dense import BGEM3Embeddings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

DTYPES = ("float32", "bfloat16", "int8")


def read(file: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Contexts, questions, and each question's context."""
    paragraphs = [p for entry in json.loads(file.read_text())["data"] for p in entry["paragraphs"]]
    questions = [(qa["question"], i) for i, p in enumerate(paragraphs) for qa in p["qas"]]
    right = np.array([index for _, index in questions])
    return [p["context"] for p in paragraphs], [question for question, _ in questions], right


def ranks_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank of the right context for each question, from 1; `(Q, N)` scores, `(Q,)` indices."""
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
    parser.add_argument("--languages", nargs="+", default=["en"])
    arguments = parser.parse_args()
    model = arguments.model or small()
    print(machine() + "\n")
    results = {
        language: compare(model, arguments.data / f"xquad.{language}.json")
        for language in arguments.languages
    }
    rows = [
        [
            language,
            run,
            *(f"{values[key]:.4f}" for key in ("R@1", "R@10", "MRR", "cosine")),
            f"{values['seconds']:.1f} s",
        ]
        for language, runs in results.items()
        for run, values in runs.items()
    ]
    show(["language", "dtype", "R@1", "R@10", "MRR", "lowest cosine to float32", "time"], rows)
    finish("quality", results)


def small() -> str:
    from small_model import build

    return str(build())


def compare(model: str, file: Path) -> dict[str, dict[str, float]]:
    contexts, questions, right = read(file)
    exact = None
    results = {}
    for dtype in DTYPES:
        start = time.perf_counter()
        vectors = encode(model, contexts + questions, dtype)
        seconds = time.perf_counter() - start
        exact = vectors if exact is None else exact
        scores = vectors[len(contexts) :] @ vectors[: len(contexts)].T  # (Q, N)
        figures = measures(ranks_of(scores, right))
        cosine = float((vectors * exact).sum(axis=1).min())
        results[dtype] = {**figures, "cosine": cosine, "seconds": seconds}
    return results


def encode(model: str, texts: list[str], dtype: str) -> np.ndarray:
    embeddings = BGEM3Embeddings(model=model, device="cpu", dtype=dtype, on_truncate="ignore")
    vectors = embeddings.encode(texts).dense
    embeddings.close()
    return vectors


if __name__ == "__main__":
    main()
