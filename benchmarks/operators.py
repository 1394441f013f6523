"""Which of PyTorch's operators the time of a query and of a batch goes to.

python benchmarks/operators.py --model /tmp/bge-m3-random
"""

from __future__ import annotations

import argparse
import random

from common import finish, machine, show, text_of
from torch.profiler import ProfilerActivity, profile

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.loading import load_encoder
from langchain_bge_dense._engine.outputs import Outputs

LENGTHS = {"query of 30 tokens": [30], "batch of 4 x 128 tokens": [128] * 4}
OPERATORS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    arguments = parser.parse_args()
    print(machine() + "\n")
    results = {
        f"{dtype}, {name}": shares(arguments.model, dtype, lengths)
        for dtype in arguments.dtypes
        for name, lengths in LENGTHS.items()
    }
    rows = [
        [run, ", ".join(f"{name} {share:.0%}" for name, share in found.items())]
        for run, found in results.items()
    ]
    show(["run", "operators"], rows)
    finish("operators", results)


def shares(model: str, dtype: str, lengths: list[int]) -> dict[str, float]:
    # Loaded in this thread: the profiler sees no other one.
    checkpoint = BGEM3Embeddings(model=model).session().checkpoint
    encoder = load_encoder(checkpoint, "cpu", dtype)
    chooser = random.Random(0)
    texts = [text_of(length - 2, encoder.count, chooser) for length in lengths]
    batch = [tokens.ids for tokens in encoder.tokenize(texts, max(lengths))]
    encoder.forward(batch, Outputs())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        encoder.forward(batch, Outputs())
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:OPERATORS]}


if __name__ == "__main__":
    main()
