"""Tokens per second over budgets of tokens per forward pass, for each dtype.

python benchmarks/budget.py --model /tmp/bge-m3-random
"""

from __future__ import annotations

import argparse
import random

from common import finish, machine, median_seconds, mixed_lengths, show, text_of

from langchain_bge_dense import BGEM3Embeddings

BUDGETS = (256, 512, 1_024, 2_048, 4_096, 8_192)
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("bfloat16", "float16")}
CORPUS_TOKENS = 6_000
ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtypes", nargs="+", help="default: all that suit the device")
    arguments = parser.parse_args()
    print(machine() + "\n")
    dtypes = arguments.dtypes or DTYPES[arguments.device.partition(":")[0]]
    results = {dtype: rates(arguments.model, arguments.device, dtype) for dtype in dtypes}
    rows = [[name, *(f"{rate:,.0f}" for rate in found.values())] for name, found in results.items()]
    show(["tokens/s with a budget of", *(f"{budget:,}" for budget in BUDGETS)], rows)
    finish("budget", results)


def rates(model: str, device: str, dtype: str) -> dict[int, float]:
    """The better of the rates in some rounds, by budget."""
    # Equal settings share one loaded model.
    runs = {
        budget: BGEM3Embeddings(model=model, device=device, dtype=dtype, batch_tokens=budget).load()
        for budget in BUDGETS
    }
    count, chooser = runs[BUDGETS[0]].count_tokens, random.Random(0)
    corpus = [text_of(n - 2, count, chooser) for n in mixed_lengths(CORPUS_TOKENS, chooser)]
    tokens = sum(count(text) + 2 for text in corpus)
    best = dict.fromkeys(BUDGETS, 0.0)
    for _ in range(ROUNDS):
        for budget, embeddings in runs.items():
            seconds = median_seconds(lambda run=embeddings: run.embed_documents(corpus), 1)
            best[budget] = max(best[budget], tokens / seconds)
    return best


if __name__ == "__main__":
    main()
