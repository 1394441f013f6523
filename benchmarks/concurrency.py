"""Queries from many callers at once, and queries while documents are being embedded.

python benchmarks/concurrency.py --model /tmp/bge-m3-random
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from common import finish, installed, machine, mixed_lengths, percentile, show, text_of

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable

CALLERS = (1, 8, 32, 128)
QUERIES = 128


def timed(function: Callable[[str], object], query: str) -> float:
    start = time.perf_counter()
    function(query)
    return time.perf_counter() - start


def one_after_another(embeddings: Any, queries: list[str]) -> dict[str, float]:
    start = time.perf_counter()
    seconds = [timed(embeddings.embed_query, query) for query in queries]
    return figures(seconds, time.perf_counter() - start)


def coroutines(embeddings: Any, queries: list[str], callers: int) -> dict[str, float]:
    """So many coroutines, each awaiting one query after another."""
    seconds: list[float] = []

    async def caller(own: list[str]) -> None:
        for query in own:
            start = time.perf_counter()
            await embeddings.aembed_query(query)
            seconds.append(time.perf_counter() - start)

    async def everyone() -> None:
        await asyncio.gather(*(caller(queries[first::callers]) for first in range(callers)))

    start = time.perf_counter()
    asyncio.run(everyone())
    return figures(seconds, time.perf_counter() - start)


def threads(embeddings: Any, queries: list[str], callers: int) -> dict[str, float]:
    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        seconds = list(pool.map(lambda query: timed(embeddings.embed_query, query), queries))
    return figures(seconds, time.perf_counter() - start)


def figures(seconds: list[float], total: float) -> dict[str, float]:
    return {
        "queries per second": len(seconds) / total,
        "p50": statistics.median(seconds),
        "p95": percentile(seconds, 0.95),
    }


def while_indexing(embeddings: Any, queries: list[str], corpus: list[str]) -> dict[str, float]:
    """Query latency beside a long `embed_documents`, and how long a batch of it takes."""
    start = time.perf_counter()
    embeddings.embed_documents(corpus[:20])
    tokens = sum(embeddings.count_tokens(text) + 2 for text in corpus[:20])
    rate = tokens / (time.perf_counter() - start)
    bulk = threading.Thread(target=embeddings.embed_documents, args=(corpus,), daemon=True)
    bulk.start()
    time.sleep(1)
    seconds = []
    for query in queries:
        if not bulk.is_alive():
            break
        seconds.append(timed(embeddings.embed_query, query))
    budget = embeddings.load()._engine.encoder.batch_tokens  # noqa: SLF001
    alive = bulk.is_alive()
    bulk.join()
    return {**figures(seconds, sum(seconds)), "batch": budget / rate, "covered": float(alive)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    arguments = parser.parse_args()
    print(machine() + "\n")
    results = {}
    for dtype in arguments.dtypes:
        results[f"ours, {dtype}"] = ours(arguments.model, dtype)
    if installed("langchain-huggingface"):
        results["HuggingFaceEmbeddings in threads"] = huggingface(arguments.model)
    report(results)
    finish("concurrency", results)


def short_queries(embeddings: BGEM3Embeddings, chooser: random.Random) -> list[str]:
    lengths = [chooser.randint(5, 14) for _ in range(QUERIES)]
    return [text_of(length, embeddings.count_tokens, chooser) for length in lengths]


def ours(model: str, dtype: str) -> dict[str, Any]:
    embeddings = BGEM3Embeddings(model=model, dtype=dtype, device="cpu").load()
    chooser = random.Random(0)
    queries = short_queries(embeddings, chooser)
    results: dict[str, Any] = {"one after another": one_after_another(embeddings, queries)}
    for callers in CALLERS:
        results[f"{callers} callers"] = coroutines(embeddings, queries, callers)
    lengths = mixed_lengths(15_000, chooser)
    corpus = [text_of(length - 2, embeddings.count_tokens, chooser) for length in lengths]
    results["beside documents"] = while_indexing(embeddings, queries[:40], corpus)
    embeddings.close()
    return results


def huggingface(model: str) -> dict[str, Any]:
    from langchain_huggingface import HuggingFaceEmbeddings

    counter = BGEM3Embeddings(model=model, dtype="bfloat16")
    queries = short_queries(counter, random.Random(0))[:64]
    counter.close()
    embeddings = HuggingFaceEmbeddings(model_name=model)
    results = {"one after another": one_after_another(embeddings, queries[:16])}
    for callers in CALLERS[1:]:
        results[f"{callers} callers"] = threads(embeddings, queries, callers)
    return results


def report(results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, runs in results.items():
        alone = runs["one after another"]["queries per second"]
        for run, measured in runs.items():
            rate = measured["queries per second"]
            batch = f"{measured['batch'] * 1e3:.0f} ms" if "batch" in measured else ""
            times = [f"{measured[key] * 1e3:.0f} ms" for key in ("p50", "p95")]
            rows.append([name, run, f"{rate:.1f}", f"{rate / alone:.1f}x", *times, batch])
    show(["encoder", "callers", "queries/s", "to one by one", "p50", "p95", "a batch takes"], rows)


if __name__ == "__main__":
    main()
