"""Memory that compiled products take after batches of many sizes.

    python benchmarks/sizes.py

PyTorch and oneDNN compile a product for each number of tokens, and keep up to 1,024 of them each.
The package keeps a few. Both run here, on one layer of BGE-M3's width, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import finish, machine, resident_memory, show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LAYER = {"layers": 1, "hidden": 1_024, "heads": 16, "intermediate": 4_096, "positions": 1_012}
SIZES = range(8, 1_010)  # tokens
READ_AFTER = (240, 1_000)  # sizes
LIMITS = {
    "of this package": ({}, READ_AFTER[-1]),
    "1,024": ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}, 240),
}
DTYPES = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        model, sizes = arguments.worker
        print(json.dumps(growth(model, arguments.dtypes[0], int(sizes))))
        return
    from tiny_m3 import build

    print(machine() + "\n")
    with tempfile.TemporaryDirectory() as folder:
        model = str(build(Path(folder) / "layer", **LAYER))
        results = {
            f"{dtype}, limit {limit}": run(model, dtype, sizes, environment)
            for dtype in arguments.dtypes
            for limit, (environment, sizes) in LIMITS.items()
        }
    rows = [
        [name, *(told(found.get(str(n))) for n in READ_AFTER)] for name, found in results.items()
    ]
    show(["dtype", *(f"after {n:,} sizes" for n in READ_AFTER)], rows)
    finish("sizes", results)


def told(mebibytes: float | None) -> str:
    return "" if mebibytes is None else f"{mebibytes:,.0f} MiB"


def run(model: str, dtype: str, sizes: int, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--dtypes", dtype, "--worker", model, str(sizes)]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    return dict(json.loads(process.stdout))


def growth(model: str, dtype: str, sizes: int) -> dict[str, float]:
    """Growth of this process in MiB, by the number of sizes so far."""
    from langchain_bge_dense import BGEM3Embeddings

    embeddings = BGEM3Embeddings(model=model, device="cpu", dtype=dtype)

    def embed(tokens: int) -> None:
        embeddings.encode([" ".join(["a"] * (tokens - 2))], lexical=True, colbert=True)

    for tokens in (SIZES[-1], 512, 300):
        embed(tokens)
    before, figures = resident_memory(), {}
    for number, tokens in enumerate(random.Random(1).sample(SIZES, sizes), 1):
        embed(tokens)
        if number in READ_AFTER:
            figures[str(number)] = 1_024 * (resident_memory() - before)
    return figures


if __name__ == "__main__":
    main()
