"""Time, memory and disk for large corpora, from a measured rate and a measured collection.

    python benchmarks/estimate.py --tokens-per-second 600

Fills a Chroma collection on disk with random vectors of BGE-M3's width and multiplies what a
passage takes there. The rate is that of `benchmarks/encode.py` on the machine that will embed.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import numpy as np
from common import finish, machine, peak_memory, show
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense.chroma import index_vectors, open_chroma
from langchain_bge_dense.chroma.settings import fingerprint_of

WIDTH = 1_024
SAMPLE = 20_000
SIZES = (1_000_000, 100_000_000, 1_000_000_000)
CHARACTERS_PER_TOKEN = 4
DAY = 86_400


def passage(row: int, tokens: int, chooser: np.random.Generator) -> tuple[Document, np.ndarray]:
    """A document of random letters with a random unit vector, `(WIDTH,)`."""
    letters = chooser.integers(97, 123, tokens * CHARACTERS_PER_TOKEN, dtype=np.uint8)
    vector = chooser.standard_normal(WIDTH, dtype=np.float32)
    document = Document(letters.tobytes().decode(), metadata={"source": f"{row}.txt"})
    return document, vector / np.linalg.norm(vector)


def measure(tokens: int) -> dict[str, float]:
    """Bytes of memory and of disk that a passage takes in a Chroma collection."""
    chooser = np.random.default_rng(0)
    embeddings = DeterministicFakeEmbedding(size=WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        store = open_chroma(embeddings, "estimate", persist_directory=folder)
        passages = (passage(row, tokens, chooser) for row in range(SAMPLE))
        print(f"Filling a collection with {SAMPLE:,} passages.", flush=True)
        before = peak_memory()
        index_vectors(store, passages, fingerprint=fingerprint_of(embeddings))
        gc.collect()
        memory = (peak_memory() - before) * 2**30 / SAMPLE
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"memory": memory, "disk": disk / SAMPLE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-second", type=float, required=True, help="of one machine")
    parser.add_argument("--tokens", type=int, default=200, help="per passage (default: 200)")
    arguments = parser.parse_args()
    print(machine())
    each = measure(arguments.tokens)
    print(
        f"\nA passage takes {each['memory']:,.0f} B of memory and {each['disk']:,.0f} B on disk.\n"
    )
    rows = [
        [
            f"{size:,}",
            f"{size * arguments.tokens / arguments.tokens_per_second / DAY:,.1f} days",
            f"{size * each['memory'] / 2**30:,.0f} GiB",
            f"{size * each['disk'] / 2**30:,.0f} GiB",
        ]
        for size in SIZES
    ]
    show(["passages", "to embed on one such machine", "memory of the server", "disk"], rows)
    finish("estimate", {**each, "tokens per second": arguments.tokens_per_second})


if __name__ == "__main__":
    main()
