"""What a safe collection costs beside plain Chroma, and the first query after a kill.

    python benchmarks/store.py writing                      # 10,000 and 40,000 vectors
    python benchmarks/store.py writing --sizes 100000
    python benchmarks/store.py kill --sizes 10000 100000

Writing: random unit vectors of 1,024 numbers in batches of 256, by `upsert` of plain Chroma and by
`index_vectors`, each in a process of its own; bytes are those that the process passed to the
system's calls, from its own I/O counters. Kill: a process is killed where it has just persisted its
index in part; then the collection is opened and asked once. Its index is built in haste, with fewer
candidates for links than by default: its files have the size that they always have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
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
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense.chroma import index_vectors, open_chroma
from langchain_bge_dense.chroma.settings import fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import SimpleNamespace

WIDTH, BATCH = 1_024, 256
EMBEDDINGS = DeterministicFakeEmbedding(size=WIDTH)


def rows(count: int) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with random unit vectors."""
    chooser = np.random.default_rng(0)
    for number in range(count):
        vector = chooser.standard_normal(WIDTH, np.float32)
        document = Document(f"passage {number}", metadata={"number": number})
        yield document, vector / np.linalg.norm(vector)


def written() -> int:
    """Bytes that this process has written so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def fill_plain(folder: str, count: int) -> None:
    client = chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))
    collection = client.create_collection(
        "speed", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    for batch in batch_iterate(BATCH, rows(count)):
        collection.upsert(
            ids=[
                hashlib.sha256(document.page_content.encode()).hexdigest() for document, _ in batch
            ],
            documents=[document.page_content for document, _ in batch],
            metadatas=[document.metadata for document, _ in batch],
            embeddings=[vector for _, vector in batch],
        )


def fill_safely(folder: str, count: int, **options: Any) -> None:
    with open_chroma(EMBEDDINGS, "speed", persist_directory=folder, **options) as store:
        index_vectors(store, rows(count), fingerprint=fingerprint_of(EMBEDDINGS), batch_size=BATCH)


def fill_and_die(folder: str, count: int) -> None:
    """Fill a collection, and die in the last rewriting of its index, of which half is done."""
    from chromadb.api.models.Collection import Collection

    hasty = {"collection_configuration": {"hnsw": {"ef_construction": 10}}}
    fill_safely(folder, count, **hasty)
    upsert = Collection.upsert

    def upsert_and_die(self: Collection, *arguments: Any, **columns: Any) -> None:
        backups = list(Path(folder).glob("*.backup/header.bin"))
        if not backups:
            upsert(self, *arguments, **columns)
            return
        index = Path(folder, backups[0].parent.name.partition(".")[0])
        database = Path(folder, "chroma.sqlite3").read_bytes()
        level_0 = index / "data_level0.bin"
        before = level_0.read_bytes()
        upsert(self, *arguments, **columns)
        with level_0.open("r+b") as file:  # the second half is the old one
            file.seek(len(before) // 2)
            file.write(before[len(before) // 2 :])
        Path(folder, "chroma.sqlite3").write_bytes(database)
        os.kill(os.getpid(), signal.SIGKILL)

    Collection.upsert = upsert_and_die  # type: ignore[method-assign]
    fill_safely(folder, count + 3_000, **hasty)


def child(arguments: argparse.Namespace) -> None:
    """One filling, in a process of its own."""
    fills = {"plain": fill_plain, "safe": fill_safely, "die": fill_and_die}
    before, start = written(), time.perf_counter()
    fills[arguments.kind](arguments.folder, arguments.count)
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": written() - before, "seconds": seconds}))


def in_a_process(kind: str, folder: str, count: int) -> dict[str, float]:
    """What a filling in a process of its own says."""
    done = subprocess.run(
        [sys.executable, __file__, "child", kind, folder, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        check=kind != "die",
    )
    return json.loads(done.stdout or "{}")


def writing(arguments: SimpleNamespace) -> None:
    """Bytes and seconds a vector."""
    print(machine() + "\n")
    results, table = [], []
    for count in arguments.sizes:
        found = {}
        for kind in ("plain", "safe"):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found[kind] = in_a_process(kind, folder, count)
        results.append({"vectors": count, **found})
        cells = [
            f"{found[kind]['bytes'] / count / 1e3:.1f} KB, "
            f"{found[kind]['seconds'] / count * 1e3:.2f} ms"
            for kind in ("plain", "safe")
        ]
        table.append([f"{count:,}", *cells])
    show(["vectors of 1,024", "plain Chroma, a vector", "index_vectors, a vector"], table)
    finish("store writing", results)


def kill(arguments: SimpleNamespace) -> None:
    """The first query of a folder in which a process was killed."""
    print(machine() + "\n")
    results = []
    for count in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            in_a_process("die", folder, count)
            killed = bool(list(Path(folder).glob("*.backup")))
            start = time.perf_counter()
            store = open_chroma(EMBEDDINGS, "speed", persist_directory=folder)
            opened = time.perf_counter() - start
            found = store.similarity_search("anything", k=4)
            seconds = time.perf_counter() - start
            stored = len(store.get(include=[])["ids"])
            store.close()
        assert killed
        assert len(found) == 4
        results.append(
            {"vectors": stored, "opened": opened, "first query": seconds, "GiB": peak_memory()}
        )
    table = [
        [f"{run['vectors']:,}", f"{run['opened']:.2f} s", f"{run['first query']:.2f} s"]
        for run in results
    ]
    show(["vectors of 1,024", "open_chroma", "and the first answer"], table)
    finish("store kill", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("writing", writing), ("kill", kill)):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000])
        command.add_argument("--folder", help="where to write; without it, the system's own")
        command.set_defaults(run=function)
    command = commands.add_parser("child")
    command.add_argument("kind")
    command.add_argument("folder")
    command.add_argument("count", type=int)
    command.set_defaults(run=child)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
