"""What one server for many processes costs, beside the model in one process.

python benchmarks/serve.py --model /tmp/bge-m3-random
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import finish, machine, mixed_lengths, show, text_of

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS = 4
CALLERS = 32
IN_A_ROW = 8  # queries
PAUSE = 0.1  # seconds, in which the threads of the model that ran last stop spinning
SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def server(model: str, *, unix: bool = False) -> Iterator[tuple[int, str]]:
    """A server of a process of its own; gives its process id and base_url."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        place = ["--uds", f"{folder}/bge.sock"] if unix else ["--port", str(port)]
        command = [sys.executable, "-m", "langchain_bge_dense.serve", "--model", model, *place]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"unix://{folder}/bge.sock" if unix else f"http://127.0.0.1:{port}"
        try:
            while "Serving " not in (Path(folder) / "log").read_text():
                assert process.poll() is None
                time.sleep(PAUSE)
            yield process.pid, url
        finally:
            process.terminate()
            process.wait()


def pss(pid: int) -> float:
    """Memory of a process in GiB, shared pages divided by those who share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**20


def worker(fields: dict[str, Any], queries: list[str], ready: Any, go_on: Any) -> None:
    """A process of a web application: its callers ask one query after another."""
    embeddings = BGEM3Embeddings(**fields)
    embeddings.embed_query("once, so that all is imported")
    ready.release()
    go_on.wait()
    with ThreadPoolExecutor(CALLERS // WORKERS) as pool:
        list(pool.map(embeddings.embed_query, queries))
    ready.release()
    go_on.wait()


@contextmanager
def workers(count: int, fields: dict[str, Any], queries: list[str]) -> Iterator[tuple]:
    """Processes that wait; gives their ids, how to start them, and how to wait for all."""
    ready, go_on = SPAWN.Semaphore(0), SPAWN.Event()
    parts = [queries[first::count] for first in range(count)]
    processes = [SPAWN.Process(target=worker, args=(fields, part, ready, go_on)) for part in parts]
    for process in processes:
        process.start()

    def wait() -> None:
        for _ in processes:
            assert ready.acquire(timeout=600)

    wait()
    yield [process.pid for process in processes], go_on.set, wait
    go_on.set()
    for process in processes:
        process.join()


def memory(model: str) -> dict[str, float]:
    """Before this process imports PyTorch, whose pages it would share."""
    with workers(1, {"model": model}, []) as ([alone], _, _):
        one = pss(alone)
    with server(model) as (pid, url), workers(WORKERS, {"base_url": url}, []) as (pids, _, _):
        served, each = pss(pid), statistics.mean(map(pss, pids))
    return {"one process": one, "server": served, "a worker": each}


def added(here: BGEM3Embeddings, url: str, queries: list[str]) -> dict[str, float]:
    """Median time of a query in this process, and what a server adds, by turns of some in a row.

    The first of each turn counts apart: the machine's cores and the threads of the model have
    gone to sleep in the pause before it, wherever the model runs.
    """
    there = BGEM3Embeddings(base_url=url)
    times: dict[str, list[float]] = {}
    for start in range(0, len(queries), IN_A_ROW):
        for name, embeddings in (("in process", here), ("served", there)):
            time.sleep(PAUSE)
            for index, query in enumerate(queries[start : start + IN_A_ROW]):
                begin = time.perf_counter()
                embeddings.embed_query(query)
                key = name if index else f"{name}, first"
                times.setdefault(key, []).append(time.perf_counter() - begin)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "in process": medians["in process"],
        "added": medians["served"] - medians["in process"],
        "added to the first": medians["served, first"] - medians["in process, first"],
    }


def concurrent(here: BGEM3Embeddings, url: str, queries: list[str]) -> dict[str, float]:
    """Queries per second of so many callers: threads here, or four processes and a server."""
    start = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(here.embed_query, queries))
    threads = len(queries) / (time.perf_counter() - start)
    with workers(WORKERS, {"base_url": url}, queries) as (_, go_on, wait):
        start = time.perf_counter()
        go_on()
        wait()
        processes = len(queries) / (time.perf_counter() - start)
    return {"threads of one process": threads, "four processes": processes}


def throughput(
    here: BGEM3Embeddings, url: str, corpus: list[str], tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens per second of a corpus, by turns."""
    there = BGEM3Embeddings(base_url=url)
    rates: dict[str, list[float]] = {"in process": [], "served": []}
    for _ in range(rounds):
        for name, embeddings in (("in process", here), ("served", there)):
            start = time.perf_counter()
            embeddings.embed_documents(corpus)
            rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--tokens", type=int, default=2_000, help="of the corpus [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="over the corpus [%(default)s]")
    parser.add_argument("--queries", type=int, default=128, help="[%(default)s]")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"memory": memory(arguments.model)}
    here = BGEM3Embeddings(model=arguments.model).load()
    chooser = random.Random(0)
    queries = [text_of(chooser.randint(5, 14), here.count_tokens, chooser) for _ in range(128)]
    lengths = mixed_lengths(arguments.tokens, chooser)
    corpus = [text_of(length - 2, here.count_tokens, chooser) for length in lengths]
    with server(arguments.model) as (_, url):
        results["loopback"] = added(here, url, queries[: arguments.queries])
        results["concurrent"] = concurrent(here, url, queries)
        results["corpus"] = throughput(here, url, corpus, sum(lengths), arguments.rounds)
    with server(arguments.model, unix=True) as (_, url):
        results["Unix socket"] = added(here, url, queries[: arguments.queries])
    print(machine() + "\n")
    report(results)
    finish("serve", results)


def report(results: dict[str, Any]) -> None:
    gib, rates, corpus = results["memory"], results["concurrent"], results["corpus"]
    together = gib["server"] + WORKERS * gib["a worker"]
    rows = [
        [
            "memory of four workers and a server / one process",
            f"{together / gib['one process']:.2f}",
            f"({gib['server']:.2f} + 4 x {gib['a worker']:.2f}) / {gib['one process']:.2f} GiB",
        ]
    ]
    for place in ("loopback", "Unix socket"):
        alone, more, first = (seconds * 1e3 for seconds in results[place].values())
        rows += [
            [f"added to a query, {place}", f"{more:.1f} ms", f"to {alone:.1f} ms"],
            [f"added to one after {PAUSE} s of silence, {place}", f"{first:.1f} ms", ""],
        ]
    processes, threads = rates["four processes"], rates["threads of one process"]
    served, alone = corpus["served"], corpus["in process"]
    rows += [
        [
            f"{CALLERS} callers in four processes / in threads of one",
            f"{processes / threads:.2f}",
            f"{processes:.1f} / {threads:.1f} queries/s",
        ],
        [
            "corpus through a server / in process",
            f"{served / alone:.2f}",
            f"{served:,.0f} / {alone:,.0f} tokens/s",
        ],
    ]
    show(["", "", "of"], rows)


if __name__ == "__main__":
    main()
