"""Time and peak memory of `embed_stream` over growing streams: time linear, memory flat.

    python benchmarks/scaling.py

Runs on a tiny random checkpoint, so that what is measured is everything but the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import finish, machine, peak_memory, show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIZES = (1_000, 10_000, 100_000)


def work(model: str, texts: int) -> dict[str, float]:
    from langchain_bge_dense import BGEM3Embeddings

    embeddings = BGEM3Embeddings(model=model, device="cpu", dtype="float32")
    embeddings.embed_query("warm")
    before = peak_memory()
    start = time.perf_counter()
    count = sum(1 for _ in embeddings.embed_stream(f"passage {i} of many" for i in range(texts)))
    seconds = time.perf_counter() - start
    return {"texts": count, "seconds": seconds, "before": before, "peak": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker[0], int(arguments.worker[1]))))
        return
    print(machine() + "\n")
    results = measure()
    rows = [
        [
            f"{run['texts']:,}",
            f"{run['seconds']:.1f} s",
            f"{run['texts'] / run['seconds']:,.0f}",
            f"{run['before']:.2f} GiB",
            f"{run['peak']:.2f} GiB",
        ]
        for run in results
    ]
    show(["texts", "time", "texts/s", "memory before", "peak memory"], rows)
    finish("scaling", results)


def measure() -> list[dict[str, float]]:
    from tiny_m3 import build

    with tempfile.TemporaryDirectory() as folder:
        model = str(build(Path(folder) / "tiny"))
        commands = [[sys.executable, __file__, "--worker", model, str(size)] for size in SIZES]
        outputs = [
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            for command in commands
        ]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


if __name__ == "__main__":
    main()
