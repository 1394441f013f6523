"""What the graph of a collection finds of the nearest passages, and what a wider one costs.

    python benchmarks/recall.py
    python benchmarks/recall.py --sizes 4000 --rounds 5

Chroma's own graph, that graph with a longer search, the graph of `open_chroma` in a plain Chroma,
and stores of `open_chroma`, each in a process of its own, against brute force. Vectors of 1,024
numbers vary in 64 directions, as those of a model do in few; with repeats, three of ten passages
are one of three texts, as page headers are. A query is a passage with a little noise. Of equal
distances, any counts as found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chromadb
import numpy as np
from chromadb.config import Settings
from common import finish, machine, peak_memory, show
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense.chroma import open_chroma
from langchain_bge_dense.chroma.settings import cosine_configuration

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANSWER = ["documents", "metadatas", "distances"]  # what LangChain asks for
WIDTH, DIRECTIONS, BATCH = 1_024, 64, 1_000
QUERIES, NEAREST = 200, 50
UPDATES = 200  # of passages, by other vectors
REPEATED, TEXTS = 0.3, 3
NOISE = 0.1  # of a query, beside the length of a passage
ROUNDING = 1e-5  # of a distance in float32
PLAIN: dict[str, Any] = {
    "Chroma's own": {"space": "cosine"},
    "and ef_search 400": {"space": "cosine", "ef_search": 400},
    "open_chroma's": cosine_configuration(None)["hnsw"],
}
STORES: dict[str, Any] = {
    "a store": {},
    "a store, ef_construction 200": {"ef_construction": 200},
    "a store, 32 links": {"ef_construction": 200, "max_neighbors": 32},
}


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def passages(count: int, *, repeats: bool, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors `(count, WIDTH)`, in random order."""
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, WIDTH), np.float32)
    chooser = np.random.default_rng([1, seed])
    vectors = unit(chooser.standard_normal((count, DIRECTIONS), np.float32) @ directions)
    if repeats:
        chosen = chooser.permutation(count)[: int(REPEATED * count)]
        vectors[chosen] = vectors[chosen[np.arange(len(chosen)) % TEXTS]]
    return vectors


def queries(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors `(QUERIES, WIDTH)` near passages."""
    chooser = np.random.default_rng(2)
    near = vectors[chooser.choice(len(vectors), QUERIES, replace=False)]
    noise = unit(chooser.standard_normal(near.shape, np.float32))
    return unit(near + np.float32(NOISE) * noise)


def write(collection: Any, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    """Write rows of vectors, whose numbers are their ids."""
    for part in np.array_split(rows, range(BATCH, len(rows), BATCH)):
        ids = list(map(str, part))
        collection.upsert(
            ids=ids, embeddings=vectors[part], documents=ids, metadatas=[None] * len(ids)
        )


def change(collection: Any, vectors: NDArray[np.float32], rounds: int, *, repeats: bool) -> None:
    """Delete half of the passages, update three of ten others, and add as many as are missing."""
    for number in range(1, rounds + 1):
        order = np.random.default_rng([3, number]).permutation(len(vectors))
        gone, updated = order[: len(order) // 2], order[len(order) // 2 :][: len(order) * 3 // 20]
        new = np.concatenate([gone, updated])
        for part in np.array_split(gone, range(BATCH, len(gone), BATCH)):
            collection.delete(ids=list(map(str, part)))
        vectors[new] = passages(len(new), repeats=repeats, seed=number)
        write(collection, updated, vectors)
        write(collection, gone, vectors)


def measure(graph: str, count: int, *, repeats: bool, rounds: int, folder: str) -> dict[str, float]:
    """Fill a collection, change it, and ask it."""
    vectors = passages(count, repeats=repeats)
    collection = opened(graph, folder)
    start = time.perf_counter()
    write(collection, np.arange(count), vectors)
    collection.query(vectors[:1], n_results=NEAREST, include=ANSWER)  # the graph is complete
    filled = time.perf_counter() - start
    rows = np.arange(0, count, count // UPDATES)[:UPDATES]
    vectors[rows] = passages(UPDATES, repeats=False, seed=100)
    start = time.perf_counter()
    write(collection, rows, vectors)
    collection.query(vectors[:1], n_results=NEAREST, include=ANSWER)
    updated = time.perf_counter() - start
    change(collection, vectors, rounds, repeats=repeats)
    asked = queries(vectors)
    collection.query(asked[:1], n_results=NEAREST, include=ANSWER)
    start = time.perf_counter()
    found = [collection.query(q[None], n_results=NEAREST, include=ANSWER)["ids"] for q in asked]
    seconds = (time.perf_counter() - start) / QUERIES
    size = sum(file.stat().st_size for file in Path(folder).glob("*/*"))
    return {
        "recall": recall(vectors, asked, [list(map(int, ids)) for [ids] in found]),
        "filling": filled / count,
        "update": updated / UPDATES,
        "query": seconds,
        "memory": peak_memory(),
        "bytes": size / count,
    }


def opened(graph: str, folder: str) -> Any:
    """Make a collection of Chroma, or that of a store, whose calls have the same names."""
    if graph in STORES:
        store = open_chroma(
            DeterministicFakeEmbedding(size=WIDTH),
            persist_directory=folder,
            collection_configuration={"hnsw": STORES[graph]},
        )
        store.passages.acquire_writer()  # as whatever writes to a store does
        return store.passages.collection
    client = chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))
    configuration: Any = {"hnsw": PLAIN[graph]}
    return client.create_collection("recall", configuration=configuration, embedding_function=None)


def recall(
    vectors: NDArray[np.float32], asked: NDArray[np.float32], found: list[list[int]]
) -> float:
    """Share of the found passages that are as near as the nearest by brute force."""
    hits = 0
    for query, rows in zip(asked, found, strict=True):
        similarities = vectors @ query  # (count,)
        least = np.partition(similarities, -NEAREST)[-NEAREST]
        hits += int((similarities[rows] >= least - ROUNDING).sum())
    return hits / (NEAREST * QUERIES)


def in_a_process(graph: str, **given: Any) -> dict[str, float]:
    """Measure in a process of its own, as one holds on to memory."""
    with tempfile.TemporaryDirectory() as folder:
        child = json.dumps({"graph": graph, "folder": folder, **given})
        command = [sys.executable, __file__, "--child", child]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    every = [*PLAIN, *STORES]
    parser.add_argument("--graphs", choices=every, nargs="+", default=every)
    parser.add_argument(
        "--rounds", type=int, default=0, help="of deletes and updates before asking"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**arguments.child)))
        return
    print(machine() + "\n")
    results = []
    for count in arguments.sizes:
        for repeats in (False, True):
            for graph in arguments.graphs:
                row = in_a_process(graph, count=count, repeats=repeats, rounds=arguments.rounds)
                results.append({"graph": graph, "passages": count, "repeats": repeats, **row})
    table = [
        [
            f"{row['passages']:,}{', repeats' if row['repeats'] else ''}",
            row["graph"],
            f"{row['recall']:.4f}",
            f"{row['filling'] * 1e3:.2f} ms",
            f"{row['update'] * 1e3:.1f} ms",
            f"{row['query'] * 1e3:.1f} ms",
            f"{row['memory']:.2f} GiB",
            f"{row['bytes']:,.0f} B",
        ]
        for row in results
    ]
    header = ["passages", "graph", f"recall at {NEAREST}", "filling, each"]
    show([*header, "an update", "a query", "peak memory", "index, each"], table)
    finish("recall", results)


if __name__ == "__main__":
    main()
