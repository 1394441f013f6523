"""What `adopt` costs beside a copy of the same vectors by plain Chroma.

    python benchmarks/adopt.py                                  # 10,000 vectors of 1,024 numbers
    python benchmarks/adopt.py --count 1000 --rounds 1

A collection in l2 space is filled in one folder, and copied into a new folder three times in turn,
each in a process of its own: by plain Chroma with its own graph, by plain Chroma with the wider
graph of a store, and by `adopt`, which reads everything once more before, and embeds ten texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import chromadb
from chromadb.config import Settings
from common import finish, machine, peak_memory, show
from langchain_chroma import Chroma
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense.chroma import adopt
from langchain_bge_dense.chroma.settings import cosine_configuration

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

WIDTH, PAGE = 1_024, 256
EMBEDDINGS = DeterministicFakeEmbedding(size=WIDTH)
WORDS = "a passage of a hundred words or so, as splitters cut them " * 8
GRAPHS = {
    "plain Chroma": {"hnsw": {"space": "cosine"}},
    "plain Chroma, graph of a store": cosine_configuration(None),
}
ADOPT = "adopt"


def client_of(folder: Path) -> ClientAPI:
    return chromadb.PersistentClient(str(folder), Settings(anonymized_telemetry=False))


def fill(folder: Path, count: int) -> None:
    """A collection as langchain-chroma makes it."""
    store = Chroma("speed", EMBEDDINGS, client=client_of(folder))
    for start in range(0, count, PAGE):
        numbers = range(start, min(start + PAGE, count))
        store.add_texts(
            [f"{number} {WORDS}" for number in numbers], [{"number": number} for number in numbers]
        )


def copy_plainly(kind: str, source: Path, target: Path) -> None:
    old = client_of(source).get_collection("speed", embedding_function=None)
    new = client_of(target).create_collection(
        "speed", configuration=GRAPHS[kind], embedding_function=None
    )
    for offset in range(0, old.count(), PAGE):
        page = old.get(limit=PAGE, offset=offset, include=["documents", "metadatas", "embeddings"])
        new.upsert(
            ids=page["ids"],
            documents=page["documents"],
            metadatas=page["metadatas"],
            embeddings=page["embeddings"],
        )


def copy_safely(source: Path, target: Path) -> None:
    old = Chroma("speed", client=client_of(source))
    adopt(EMBEDDINGS, "speed", source=old, persist_directory=target).close()


def child(kind: str, source: Path, target: Path) -> None:
    """One copy, in a process of its own."""
    start = time.perf_counter()
    if kind == ADOPT:
        copy_safely(source, target)
    else:
        copy_plainly(kind, source, target)
    print(json.dumps({"seconds": time.perf_counter() - start, "GiB": peak_memory()}))


def in_a_process(kind: str, source: Path, folder: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as target:
        command = [sys.executable, __file__, "--child", kind, str(source), target]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(arguments: argparse.Namespace) -> None:
    print(machine() + "\n")
    kinds = [*GRAPHS, ADOPT]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as source:
        fill(Path(source), arguments.count)
        for _ in range(arguments.rounds):
            for kind in kinds:
                runs[kind].append(in_a_process(kind, Path(source), arguments.folder))
    seconds = {kind: statistics.median(run["seconds"] for run in runs[kind]) for kind in kinds}
    memory = {kind: max(run["GiB"] for run in runs[kind]) for kind in kinds}
    rows = [
        [
            kind,
            f"{seconds[kind]:.1f} s",
            *(f"{seconds[kind] / seconds[plain]:.2f}x" for plain in GRAPHS),
            f"{memory[kind]:.2f} GiB",
        ]
        for kind in kinds
    ]
    header = [f"{arguments.count:,} vectors of {WIDTH:,}", "time", "÷ plain Chroma"]
    show([*header, "÷ the same graph", "peak memory"], rows)
    finish("adopt", {"count": arguments.count, "seconds": seconds, "GiB": memory})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="vectors [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="copies of each kind [%(default)s]")
    parser.add_argument("--folder", help="where to write; without it, the system's own")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, source, target = arguments.child
        child(kind, Path(source), Path(target))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
