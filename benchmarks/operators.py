"""Which of PyTorch's operators the time of a query and of a batch goes to.

    python benchmarks/operators.py --model /tmp/bge-m3-random

Beside it stands how long it takes to read as many bytes as the layers' weights have: nothing that
reads them for each query can be faster.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from common import finish, machine, median_seconds, show, text_of
from torch.profiler import ProfilerActivity, profile

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.encoding import Outputs
from langchain_bge_dense._engine.loading import load_encoder

LENGTHS = {
    "query of 10 tokens": [10],
    "query of 30 tokens": [30],
    "batch of 4 x 128 tokens": [128] * 4,
}
OPERATORS = 6
REPEATS = 21
LAYER_WEIGHTS = 24 * 12 * 1_024**2  # of BGE-M3's layers
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    arguments = parser.parse_args()
    print(machine() + "\n")
    results = {
        f"{dtype}, {name}": measure(arguments.model, dtype, lengths)
        for dtype in arguments.dtypes
        for name, lengths in LENGTHS.items()
    }
    rows = [
        [
            run,
            f"{found['seconds'] * 1e3:.0f} ms",
            f"{found['reading'] * 1e3:.0f} ms",
            ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items()),
        ]
        for run, found in results.items()
    ]
    show(["run", "time", "reading alone", "operators"], rows)
    finish("operators", results)


def measure(model: str, dtype: str, lengths: list[int]) -> dict[str, Any]:
    # Loaded in this thread: the profiler sees no other one.
    checkpoint = BGEM3Embeddings(model=model).session().checkpoint
    encoder = load_encoder(checkpoint, "cpu", dtype)
    chooser = random.Random(0)
    texts = [text_of(length - 2, encoder.count, chooser) for length in lengths]
    batch = [tokens.ids for tokens in encoder.tokenize(texts, max(lengths))]
    seconds = median_seconds(lambda: encoder.forward(batch, Outputs()), REPEATS)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        encoder.forward(batch, Outputs())
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = {event.key: event.self_cpu_time_total / total for event in events[:OPERATORS]}
    weights = torch.ones(LAYER_WEIGHTS * BYTES[dtype] // 8, dtype=torch.int64)
    return {"seconds": seconds, "reading": median_seconds(weights.sum, REPEATS), "shares": shares}


if __name__ == "__main__":
    main()
