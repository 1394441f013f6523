"""What a hybrid query costs, and what its lexical side finds behind a filter.

python benchmarks/hybrid.py latency
python benchmarks/hybrid.py index --sizes 100000 1000000
python benchmarks/hybrid.py filters
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
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, machine, median_seconds, percentile, show
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense._scoring import lexical_scores
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.records import Record
from langchain_bge_dense.chroma.search import Search, nearest
from langchain_bge_dense.chroma.signals import Encoded, Position, key_of, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from langchain_bge_dense.chroma import BGEM3Chroma
    from langchain_bge_dense.chroma.lexical import LexicalIndex

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIZES = (1_000, 10_000, 100_000)
WIDTH = 128
BATCH = 1_000  # random passages written at once


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
            weights = open_chroma(embeddings, persist_directory=folder).passages.index
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


def random_weights(size: int) -> Iterator[list[dict[int, float]]]:
    """Lexical weights of passages of 40 tokens with Zipf's frequencies, a thousand at a time."""
    chooser = np.random.default_rng(0)
    for _ in range(0, size, BATCH):
        tokens = np.minimum(chooser.zipf(1.1, (BATCH, 40)), 250_000)
        weights = chooser.random((BATCH, 40), np.float32)
        rows = zip(tokens.tolist(), weights.tolist(), strict=True)
        yield [dict(zip(*row, strict=True)) for row in rows]


def fill_index(store: BGEM3Chroma, size: int) -> None:
    """Write random weights of so many passages."""
    store.passages.acquire_writer()
    for number, lexical in enumerate(random_weights(size)):
        ids = (f"{number * BATCH + row:064}" for row in range(BATCH))
        encoded = Encoded(np.empty((BATCH, 0), np.float32), list(map(pack, lexical)))
        store.passages.signals.put([key_of(p, p) for p in ids], encoded)
    store.close()


def filters(arguments: argparse.Namespace) -> None:
    """Candidates behind a filter; lexical ones beside exact scores of all that pass it."""
    print(machine() + "\n")
    share_of = np.random.default_rng(1).random(arguments.size)  # (N,)
    lexical = list(chain.from_iterable(random_weights(arguments.size)))
    queries = [dict(list(lexical[number].items())[:8]) for number in range(arguments.queries)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = open_chroma(DeterministicFakeEmbedding(size=8), persist_directory=folder)
        fill_store(store, lexical, share_of)
        for share in (0.5, 0.05, 0.001):
            rows = np.flatnonzero(share_of < share).tolist()
            where = {"where": {"share": {"$lt": share}}}
            search = Search("", 4, arguments.count, (0, 1, 0), "standard", filters=where)
            exact = [best_of(lexical, rows, query, arguments.count) for query in queries]
            results.append({"share": share, **searched(store, queries, search, lexical, exact)})
    table = [
        [
            f"{run['share']:.1%}",
            f"{run['recall']:.4f}",
            *(
                f"{run[name] * 1e3:.1f} ms"
                for name in ("filter", "dense", "lexical", "dense alone", "of 500")
            ),
        ]
        for run in results
    ]
    header = ["passages that pass", f"lexical recall at {arguments.count}", "the filter"]
    header += ["dense candidates", "lexical candidates", "a dense query alone"]
    show([*header, "the filter for 500 ids"], table)
    finish("hybrid filters", results)


def fill_store(
    store: BGEM3Chroma, lexical: Sequence[Mapping[int, float]], share_of: np.ndarray[Any, Any]
) -> None:
    """Write passages with a number from 0 to 1 that filters take."""
    passages, chooser = store.passages, np.random.default_rng(2)
    passages.acquire_writer()
    for first in range(0, len(lexical), BATCH):
        rows = lexical[first : first + BATCH]
        numbers = range(first, first + len(rows))
        records = [Record(str(n), str(n), {"share": float(share_of[n])}, n) for n in numbers]
        vectors = chooser.standard_normal((len(rows), 8)).astype(np.float32)
        passages.write(records, Encoded(vectors, list(map(pack, rows))), {})
    passages.index.sync()


def best_of(
    lexical: Sequence[Mapping[int, float]], rows: list[int], query: dict[int, float], count: int
) -> list[float]:
    """The highest scores above 0 of all passages that pass, by adding up products one by one."""
    scores = np.sort(lexical_scores(query, [lexical[row] for row in rows]))[::-1][:count]
    return scores[scores > 0].tolist()


def searched(
    store: BGEM3Chroma,
    queries: list[dict[int, float]],
    search: Search,
    lexical: Sequence[Mapping[int, float]],
    exact: list[list[float]],
) -> dict[str, float]:
    """What share of the exact best scores the index finds, and how long each step takes."""
    passages, weights = store.passages, store.passages.index
    vector = np.ones(8, np.float32)
    hits, steps = 0, []
    for query, best in zip(queries, exact, strict=True):
        times = [time.perf_counter()]
        among = passages.ids(**search.filters)
        times.append(time.perf_counter())
        nearest(passages, vector, search, among)
        times.append(time.perf_counter())
        found = weights.scores(query).ranked(search.count, among)
        times.append(time.perf_counter())
        nearest(passages, vector, search)
        times.append(time.perf_counter())
        steps.append(np.diff(times))
        scores = lexical_scores(query, [lexical[int(passage)] for passage in found]).tolist()
        hits += sum(score >= best[-1] - 1e-5 for score in scores[: len(best)]) if best else 0
    names = ("filter", "dense", "lexical", "dense alone")
    start = time.perf_counter()  # what would be asked if only the best were looked up
    passages.collection.get(
        ids=weights.scores(queries[0]).ranked(500), include=[], **search.filters
    )
    return {
        "recall": hits / sum(map(len, exact)),
        "of 500": time.perf_counter() - start,
        **dict(zip(names, np.median(steps, axis=0).tolist(), strict=True)),
    }


def resident() -> float:
    """Memory of this process now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def search_index(weights: LexicalIndex) -> list[str]:
    """Rank the passages for a query of common and rare tokens."""
    chosen = (2, 5, 12, 60, 300, 2_000, 9_000, 70_000)
    return weights.scores(dict.fromkeys(chosen, 0.5)).ranked(50)


def timings(store: BGEM3Chroma, queries: list[str]) -> dict[str, float]:
    embeddings: Any = store.embeddings
    collection = store._collection  # noqa: SLF001
    figures: dict[str, float] = {
        "bytes": weight_bytes(store) / collection.count(),
        "count": median_seconds(collection.count, 10),
    }
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
    pages = store.passages.signals.since(Position())
    return sum(len(packed or b"") for _, rows in pages for _, packed in rows)


def report(results: list[dict[str, float]]) -> None:
    rows = [
        [
            f"{run['passages']:,}",
            *(
                f"{run[name] * 1e3:.0f} / {run[f'{name} p95'] * 1e3:.0f} ms"
                for name in ("embed", "dense", "hybrid")
            ),
            f"{run['hybrid first']:.2f} s",
            f"{run['count'] * 1e3:.1f} ms",
            f"{run['bytes']:.0f}",
            f"{run['filling']:.0f} s",
        ]
        for run in results
    ]
    header = ["passages", "embedding alone", "dense query", "hybrid query", "first hybrid query"]
    header += ["counting passages", "bytes of weights a passage"]
    show([*header, "embedding and filling"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    commands.add_parser("latency", help="queries at three sizes").set_defaults(run=latency)
    about_index = commands.add_parser("index", help=index.__doc__)
    about_index.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    about_index.set_defaults(run=index)
    about_filters = commands.add_parser("filters", help=filters.__doc__)
    about_filters.add_argument("--size", type=int, default=100_000, help="passages")
    about_filters.add_argument("--queries", type=int, default=50)
    about_filters.add_argument("--count", type=int, default=50, help="candidates of a query")
    about_filters.set_defaults(run=filters)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
