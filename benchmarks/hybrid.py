"""What each signal of BGE-M3 finds through `BGEM3Retriever`, and what a hybrid query costs.

    python benchmarks/hybrid.py quality --data ../shared/data
    python benchmarks/hybrid.py quality --data ../shared/data --model BAAI/bge-m3 --languages en zh
    python benchmarks/hybrid.py latency

Quality: XQuAD (questions of a sentence, paragraphs that answer them) and, as texts of another kind,
the docstrings of Python's standard library (a first line, and the long text that stands below it).
"""

from __future__ import annotations

import argparse
import ast
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, machine, percentile, show
from langchain_core.documents import Document
from quality import measures, read, small

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from langchain_chroma import Chroma

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
        embeddings = BGEM3Embeddings(model=model, dtype="float32", backend="torch").load()
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


def timings(store: Chroma, queries: list[str]) -> dict[str, float]:
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


def weight_bytes(store: Chroma) -> int:
    """Bytes of all lexical weights as they are stored."""
    log = store._client.get_collection(f"{store._collection.id}.lexical")  # noqa: SLF001
    return sum(len(str(entry["batch"])) for entry in log.get()["metadatas"] or [])


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
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
