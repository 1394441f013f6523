"""What batches of many sizes cost: memory that compiled products keep, time to compile them again.

    python benchmarks/sizes.py

PyTorch and oneDNN compile a product for each number of tokens, and keep up to 1,024 of them each.
The package keeps a few. Both run here, on one layer of BGE-M3's width, in processes of their own;
"compiling" is what a batch takes longer by where its products are not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import finish, machine, resident_memory, show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LAYER = {"layers": 1, "hidden": 1_024, "heads": 16, "intermediate": 4_096, "positions": 2_012}
LAYERS = 24  # of BGE-M3
SIZES = range(8, 2_010)
READ_AFTER = (240, 2_000)  # sizes
TIMED = range(8, 512)  # sizes of a batch on a CPU
TIMES = 200
LIMITS = {
    "of this package": {},
    "1,024": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"},
}
DTYPES = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--sizes", type=int, default=READ_AFTER[-1], help="for the memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.dtypes[0], arguments.sizes)))
        return
    from tiny_m3 import build

    print(machine() + "\n")
    with tempfile.TemporaryDirectory() as folder:
        model = str(build(Path(folder) / "layer", **LAYER))
        results = {
            f"{dtype}, limit {limit}": run(model, dtype, arguments.sizes, environment)
            for dtype in arguments.dtypes
            for limit, environment in LIMITS.items()
        }
    show(
        ["dtype", *(f"after {n:,} sizes" for n in READ_AFTER), "a batch of one layer"],
        rows(results),
    )
    for dtype in arguments.dtypes:
        kept, compiled = (results[f"{dtype}, limit {limit}"]["batch"] for limit in reversed(LIMITS))
        share = (compiled - kept) / (kept * LAYERS)
        print(f"{dtype}: compiling takes {1e3 * (compiled - kept):.1f} ms, {share:.1%} of a batch")
    finish("sizes", results)


def run(model: str, dtype: str, sizes: int, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", model, "--dtypes", dtype]
    command += ["--sizes", str(sizes if not environment else READ_AFTER[0])]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    return dict(json.loads(process.stdout))


def work(model: str, dtype: str, sizes: int) -> dict[str, float]:
    """Growth of the process in MiB after numbers of sizes, and seconds of a batch in between."""
    from langchain_bge_dense import BGEM3Embeddings

    embeddings = BGEM3Embeddings(model=model, device="cpu", dtype=dtype)

    def embed(tokens: int) -> float:
        text = " ".join(["a"] * (tokens - 2))
        start = time.perf_counter()
        embeddings.encode([text], lexical=True, colbert=True)
        return time.perf_counter() - start

    for tokens in (SIZES[-1], 1_000, 512):
        embed(tokens)
    before = resident_memory()
    figures = {}
    for number, tokens in enumerate(random.Random(1).sample(SIZES, sizes), 1):
        embed(tokens)
        if number in READ_AFTER:
            figures[str(number)] = 1_024 * (resident_memory() - before)
    timed = random.Random(2).sample(TIMED, TIMES)
    for tokens in timed:
        embed(tokens)
    figures["batch"] = statistics.mean(embed(tokens) for tokens in timed)
    return figures


def rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    return [
        [
            name,
            *(f"{figures[str(n)]:.0f} MiB" if str(n) in figures else "" for n in READ_AFTER),
            f"{1e3 * figures['batch']:.1f} ms",
        ]
        for name, figures in results.items()
    ]


if __name__ == "__main__":
    main()
