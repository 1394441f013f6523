"""What a hybrid query costs.

python benchmarks/hybrid.py latency
python benchmarks/hybrid.py index --sizes 100000 1000000
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, machine, median_seconds, percentile, show
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.companions import Encoded

if TYPE_CHECKING:
    from langchain_bge_dense.chroma import BGEM3Chroma
    from langchain_bge_dense.chroma.lexical import LexicalWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIZES = (1_000, 10_000, 100_000)
WIDTH = 128


def random_texts(count: int, chooser: random.Random) -> list[str]:
    """Texts of about 40 tokens out of a vocabulary with Zipf's frequencies."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chooser.choices(letters, k=chooser.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    return [" ".join(chooser.choices(words, weights, k=16)) for _ in range(count)]


def latency(_: argparse.Namespace) -> None:
    from tiny_m3 import build

    print(machine() + "\n")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder) / "tiny", hidden=WIDTH)
        embeddings = BGEM3Embeddings(model=model, dtype="float32").load()
        for size in SIZES:
            chooser = random.Random(0)
            texts = random_texts(size, chooser)
            store = open_chroma(embeddings, "speed", persist_directory=Path(folder) / str(size))
            start = time.perf_counter()
            index_documents(store, (Document(text) for text in texts), lexical=True)
            filling = time.perf_counter() - start
            queries = [" ".join(text.split()[:5]) for text in chooser.choices(texts, k=100)]
            results.append({"passages": size, "filling": filling, **timings(store, queries)})
    report(results)
    finish("hybrid latency", results)


def index(arguments: argparse.Namespace) -> None:
    """The inverted index alone, on random weights: its first reading, its memory, its queries."""
    print(machine() + "\n")
    results = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            embeddings = DeterministicFakeEmbedding(size=8)
            fill_index(open_chroma(embeddings, persist_directory=folder), size)
            weights = open_chroma(embeddings, persist_directory=folder)._passages.weights  # noqa: SLF001
            before, start = resident(), time.perf_counter()
            weights.sync()
            results.append(
                {
                    "passages": size,
                    "first": time.perf_counter() - start,
                    "GiB": resident() - before,
                    "query": median_seconds(partial(search_index, weights), 50),
                }
            )
    rows = [
        [
            f"{run['passages']:,}",
            f"{run['first']:.1f} s",
            f"{run['GiB']:.2f} GiB",
            f"{run['query'] * 1e3:.0f} ms",
        ]
        for run in results
    ]
    show(["passages of 40 tokens", "first reading", "memory", "query of 8 tokens"], rows)
    finish("lexical index", results)


def fill_index(store: BGEM3Chroma, size: int) -> None:
    """Write random weights of so many passages, token ids with Zipf's frequencies."""
    chooser = np.random.default_rng(0)
    store._passages.connection.acquire_writer()  # noqa: SLF001
    for first in range(0, size, 1_000):
        tokens = np.minimum(chooser.zipf(1.1, (1_000, 40)), 250_000)
        weights = chooser.random((1_000, 40), np.float32)
        lexical = [
            dict(zip(*rows, strict=True))
            for rows in zip(tokens.tolist(), weights.tolist(), strict=True)
        ]
        ids = [f"{number:064}" for number in range(first, first + 1_000)]
        store._passages.weights.add(ids, ids, Encoded(np.empty((1_000, 0), np.float32), lexical))  # noqa: SLF001
    store.close()


def resident() -> float:
    """Memory of this process now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def search_index(weights: LexicalWeights) -> list[str]:
    """Rank the passages for a query of common and rare tokens."""
    chosen = (2, 5, 12, 60, 300, 2_000, 9_000, 70_000)
    return weights.scores(dict.fromkeys(chosen, 0.5)).ranked(50)


def timings(store: BGEM3Chroma, queries: list[str]) -> dict[str, float]:
    embeddings: Any = store.embeddings
    figures: dict[str, float] = {"bytes": weight_bytes(store) / store._collection.count()}  # noqa: SLF001
    runs = {
        "embed": embeddings.embed_query,
        "dense": BGEM3Retriever(vectorstore=store, weights=(1, 0, 0)).invoke,
        "hybrid": BGEM3Retriever(vectorstore=store).invoke,
    }
    for name, run in runs.items():
        start = time.perf_counter()
        run(queries[0])
        figures[f"{name} first"] = time.perf_counter() - start
        seconds = []
        for query in queries:
            start = time.perf_counter()
            run(query)
            seconds.append(time.perf_counter() - start)
        figures[name] = statistics.median(seconds)
        figures[f"{name} p95"] = percentile(seconds, 0.95)
    return figures


def weight_bytes(store: BGEM3Chroma) -> int:
    """Bytes of all lexical weights as they are stored."""
    log = store._passages.weights.collection()  # noqa: SLF001
    return sum(len(str(entry["batch"])) for entry in log.get()["metadatas"])


def report(results: list[dict[str, float]]) -> None:
    rows = [
        [
            f"{run['passages']:,}",
            *(
                f"{run[name] * 1e3:.0f} / {run[f'{name} p95'] * 1e3:.0f} ms"
                for name in ("embed", "dense", "hybrid")
            ),
            f"{run['hybrid first']:.2f} s",
            f"{run['bytes']:.0f}",
            f"{run['filling']:.0f} s",
        ]
        for run in results
    ]
    header = ["passages", "embedding alone", "dense query", "hybrid query", "first hybrid query"]
    show([*header, "bytes of weights a passage", "embedding and filling"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    commands.add_parser("latency", help="queries at three sizes").set_defaults(run=latency)
    about_index = commands.add_parser("index", help=index.__doc__)
    about_index.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    about_index.set_defaults(run=index)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
