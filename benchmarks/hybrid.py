"""What each signal of BGE-M3 finds through `BGEM3Retriever`, and what a hybrid query costs.

    python benchmarks/hybrid.py quality --data ../shared/data
    python benchmarks/hybrid.py quality --data ../shared/data --model BAAI/bge-m3 --languages en zh
    python benchmarks/hybrid.py latency
    python benchmarks/hybrid.py index --sizes 100000 1000000

Quality: XQuAD (questions of a sentence, paragraphs that answer them) and, as texts of another kind,
the docstrings of Python's standard library (a first line, and the long text that stands below it).
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, machine, median_seconds, percentile, show
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from quality import measures, read, small

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.companions import Encoded

if TYPE_CHECKING:
    from langchain_bge_dense.chroma import BGEM3Chroma
    from langchain_bge_dense.chroma.lexical import LexicalWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIGNALS: dict[str, dict[str, Any]] = {
    "dense": {"weights": (1, 0, 0)},
    "lexical": {"weights": (0, 1, 0)},
    "dense + lexical": {},
    "with ColBERT for the best 20": {"colbert": True},
}
SIZES = (1_000, 10_000, 100_000)
WIDTH = 128


def docstrings(most: int) -> tuple[list[str], list[str], np.ndarray]:
    """Long docstrings of the standard library as passages, their first lines as questions."""
    found: dict[str, str] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                if len(rest.strip()) > 300 and len(first.split()) > 2:
                    found.setdefault(first, rest.strip())
    chosen = list(found.items())[:most]
    right = np.arange(len(chosen))
    return [rest for _, rest in chosen], [first for first, _ in chosen], right


def ranks(retriever: BGEM3Retriever, questions: list[str], right: np.ndarray) -> np.ndarray:
    """Rank of each question's own passage; one that is not among the first 10 counts as 1,000."""
    places = []
    for question, row in zip(questions, right.tolist(), strict=True):
        rows = [document.metadata["row"] for document in retriever.invoke(question)]
        places.append(rows.index(row) + 1 if row in rows else 1_000)
    return np.array(places)


def quality(arguments: argparse.Namespace) -> None:
    model = arguments.model or small()
    embeddings = BGEM3Embeddings(model=model, on_truncate="ignore")
    sets = {
        f"XQuAD {name}": read(arguments.data / f"xquad.{name}.json") for name in arguments.languages
    }
    sets["docstrings"] = docstrings(600)
    print(f"{machine()}\n\n{embeddings.fingerprint}\n")
    results = {}
    for name, (passages, questions, right) in sets.items():
        store = open_chroma(embeddings, "hybrid")
        documents = [Document(text, metadata={"row": row}) for row, text in enumerate(passages)]
        index_documents(store, documents, lexical=True)
        for signals, settings in SIGNALS.items():
            retriever = BGEM3Retriever(vectorstore=store, k=10, **settings)
            results[f"{name}: {signals}"] = measures(ranks(retriever, questions, right))
    keys = ("R@1", "R@10", "MRR")
    rows = [[name, *(f"{found[key]:.4f}" for key in keys)] for name, found in results.items()]
    show(["texts: signals", "R@1", "R@10", "MRR of the first 10"], rows)
    finish("hybrid quality", results)


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
    about_quality = commands.add_parser("quality", help="R@1, R@10 and MRR of each signal")
    about_quality.add_argument("--data", type=Path, required=True, help="folder of xquad.en.json")
    about_quality.add_argument("--model", help="a BGE-M3 checkpoint; without it, the small model")
    about_quality.add_argument("--languages", nargs="+", default=["en"])
    about_quality.set_defaults(run=quality)
    commands.add_parser("latency", help="queries at three sizes").set_defaults(run=latency)
    about_index = commands.add_parser("index", help=index.__doc__)
    about_index.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    about_index.set_defaults(run=index)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
