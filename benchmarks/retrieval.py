"""What each signal of BGE-M3 finds, alone and together, on any retrieval set in BEIR's format.

    python benchmarks/retrieval.py convert --data ../shared/data /tmp/sets
    python benchmarks/retrieval.py run /tmp/sets/*
    python benchmarks/retrieval.py run /data/miracl-en --split dev --model BAAI/bge-m3
    python benchmarks/retrieval.py weights /tmp/sets/*
    python benchmarks/retrieval.py bytes

`convert` writes XQuAD (questions of a sentence, paragraphs that answer them) and, as texts of
another kind, the docstrings of Python's standard library (a first line, and the long text below
it) in that format. `weights` says which weights, fusion and depth of the retriever put the right
passages first. `bytes` says what ColBERT codes take beside a collection.
"""

from __future__ import annotations

import argparse
import ast
import random
import statistics
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beir_format import RetrievalSet, measures, write
from candidates import CALLERS, FUSIONS, Candidates, Setting, default, rankings
from common import finish, machine, show, text_of
from langchain_core.documents import Document
from quality import LANGUAGES, read, small

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

Rows = dict[str, dict[str, float]]  # figures by signal

CODES = ("int8", "2bit", "1bit", "1bit/2")
SIGNALS = ("dense", "sparse", "multi-vector", "dense + sparse", "all")
PUBLISHED = {
    "miracl": ("dev, nDCG@10, mean of 18 languages", (69.2, 53.9, 70.5, 70.4, 71.5)),
    "mkqa": ("Recall@100, mean of 25 languages", (75.1, 45.3, 75.3, 75.3, 75.5)),
    "mldr": ("test, nDCG@10, mean of 13 languages", (52.5, 62.2, 57.6, 64.8, 65.0)),
    "narrativeqa": ("nDCG@10", (48.7, 57.5, 55.4, 60.1, 61.7)),
}
NAMED = ((0.4, 0.2, 1), (0.4, 0.2, 0.4))  # the retriever's, and those of the model's authors
SINGLE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
DEPTHS = (20, 50, 100)  # candidates that ColBERT scores
DEPTH = 50
REORDERED = {"ColBERT": "dense", "all three": "dense + lexical"}
PASSAGES = 500


def docstrings(most: int) -> tuple[list[str], list[str], list[int]]:
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
    return [rest for _, rest in chosen], [first for first, _ in chosen], list(range(len(chosen)))


def convert(arguments: argparse.Namespace) -> None:
    """Write XQuAD and the docstrings in BEIR's format."""
    for languages in LANGUAGES:
        write(arguments.folder / f"xquad-{languages}", *read(arguments.data, languages))
    write(arguments.folder / "docstrings", *docstrings(600))


def grid() -> Iterator[Setting]:
    """Fusion, depth and weights: the retriever's, the authors', and all in steps of a tenth."""
    tenths = [
        (dense / 10, lexical / 10, (10 - dense - lexical) / 10)
        for dense in range(11)
        for lexical in range(11 - dense)
    ]
    for fusion, depth, chosen in product(FUSIONS, DEPTHS, [*NAMED, *tenths]):
        if chosen[2] or depth == DEPTH:  # without ColBERT there is no depth
            yield Setting(fusion, depth, chosen)


def run(arguments: argparse.Namespace) -> None:
    """Measure each signal, and all of them, on retrieval sets."""
    print(machine() + "\n")
    embeddings = embeddings_of(arguments)
    print(f"{embeddings.fingerprint}\n")
    results: dict[str, Rows] = {}
    for folder in arguments.folders:
        texts = RetrievalSet.read(folder, arguments.split)
        rows = without_codes(embeddings, texts)
        for codes in arguments.colbert:
            rows |= with_codes(embeddings, texts, codes)
        for name, row in rows.items():  # ColBERT reorders the best 100 of the others
            row["R@100"] = rows[REORDERED.get(name.split(", ")[0], name)]["R@100"]
        results[texts.name] = rows
    for measure in ("R@1", "nDCG@10", "bytes"):
        show_measure(measure, results)
    for name in results:
        show_published(name)
    finish("retrieval", results)


def embeddings_of(arguments: argparse.Namespace) -> BGEM3Embeddings:
    return BGEM3Embeddings(model=arguments.model or small(), on_truncate="ignore")


@contextmanager
def filled(embeddings: Any, texts: RetrievalSet, **options: Any) -> Iterator[tuple[Any, int]]:
    """A store of the set's passages in a folder, and the bytes that it takes there, a passage."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_chroma(embeddings, persist_directory=folder, lexical=True, **options)
        index_documents(store, texts.documents())
        count = len(store.get(include=[])["ids"])
        yield store, size_of(Path(folder)) // count
        store.close()


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def without_codes(embeddings: Any, texts: RetrievalSet) -> Rows:
    """The first two signals, and ColBERT from vectors computed at query time."""
    with filled(embeddings, texts) as (store, taken):
        rows = {
            name: search(BGEM3Retriever(vectorstore=store, weights=weights), texts, 100)
            for name, weights in {
                "dense": (1, 0, 0),
                "lexical": (0, 1, 0),
                "dense + lexical": default("weights"),
            }.items()
        }
        found = Candidates.of(store, list(texts.queries.values()))
        for name, weights in colbert_weights().items():
            ordered = rankings(texts, found, Setting("standard", DEPTH, weights), 10)
            rows[f"{name}, exact"] = measures(texts.relevant, ordered)
    return {name: {**row, "bytes": taken} for name, row in rows.items()}


def with_codes(embeddings: Any, texts: RetrievalSet, codes: str) -> Rows:
    """ColBERT from codes, `codes` as the command line has it."""
    with filled(embeddings, texts, **options_of(codes)) as (store, taken):
        return {
            f"{name}, {codes}": {**search(with_colbert(store, weights), texts, 10), "bytes": taken}
            for name, weights in colbert_weights().items()
        }


def options_of(codes: str) -> dict[str, Any]:
    """Arguments of `open_chroma` for codes as the command line has them, `"1bit/2"` for example."""
    kind, _, pooling = codes.partition("/")
    return {"colbert": kind or None, "colbert_pooling": int(pooling or 1)}


def with_colbert(store: Any, weights: tuple[float, ...]) -> BGEM3Retriever:
    return BGEM3Retriever(vectorstore=store, k=10, weights=weights, colbert=True, colbert_k=DEPTH)


def colbert_weights() -> dict[str, tuple[float, ...]]:
    return {"ColBERT": (0, 0, 1), "all three": default("weights")}


def search(retriever: BGEM3Retriever, texts: RetrievalSet, most: int) -> dict[str, float]:
    """Measures of the first 10; R@100 takes the first `most`."""
    queries = list(texts.queries.values())

    def at(k: int) -> dict[str, float]:
        found = retriever.batch(queries, {"max_concurrency": CALLERS}, k=k)
        ids = [[str(document.id) for document in documents] for documents in found]
        return measures(texts.relevant, dict(zip(texts.queries, ids, strict=True)))

    return at(10) if most == 10 else {**at(10), "R@100": at(most)["R@100"]}


def show_measure(measure: str, results: dict[str, Rows]) -> None:
    """One measure of every signal on every set."""
    print(f"{measure} a passage\n" if measure == "bytes" else f"{measure}\n")
    form = ",.0f" if measure == "bytes" else ".4f"
    signals = dict.fromkeys(signal for rows in results.values() for signal in rows)
    table = [
        [signal, *(format(rows[signal][measure], form) for rows in results.values())]
        for signal in signals
    ]
    show(["signals", *results], table)
    print()


def show_published(name: str) -> None:
    for start, (source, figures) in PUBLISHED.items():
        if name.lower().startswith(start):
            print(f"{name}: BGE-M3 as published (arXiv:2402.03216), {source}:\n")
            show(SIGNALS, [figures])
            print()


def weights(arguments: argparse.Namespace) -> None:
    """Find the weights, fusion and depth that put the right passages first."""
    print(machine() + "\n")
    embeddings = embeddings_of(arguments)
    results: dict[str, dict[Setting, dict[str, float]]] = {}
    for folder in arguments.folders:
        texts = RetrievalSet.read(folder, arguments.split)
        with filled(embeddings, texts) as (store, _):
            found = Candidates.of(store, list(texts.queries.values()))
        results[texts.name] = {
            setting: measures(texts.relevant, rankings(texts, found, setting, 10))
            for setting in grid()
        }
    show_weights(results)
    named = {
        name: {str(setting): row for setting, row in rows.items()} for name, rows in results.items()
    }
    finish("weights", named)


def show_weights(results: dict[str, dict[Setting, dict[str, float]]]) -> None:
    """The best of each fusion and depth, the best of each set, and those with a name."""

    rows_of = list(results.values())

    def ndcg(setting: Setting) -> float:
        return statistics.mean(rows[setting]["nDCG@10"] for rows in rows_of)

    settings = sorted(grid(), key=ndcg, reverse=True)
    shown = [next(s for s in settings if s[:2] == kind) for kind in product(FUSIONS, DEPTHS)]
    two = [setting for setting in settings if not setting.weights[2]]
    shown += [next(s for s in two if s.fusion == fusion) for fusion in FUSIONS]
    shown += [max(settings, key=lambda s: rows[s]["nDCG@10"]) for rows in rows_of]
    shown += [Setting("standard", DEPTH, named) for named in (*NAMED, *SINGLE)]
    table = [
        [str(setting), f"{ndcg(setting):.4f}", *(f"{r[setting]['nDCG@10']:.4f}" for r in rows_of)]
        for setting in dict.fromkeys(shown)
    ]
    show(["nDCG@10: dense / lexical / ColBERT", "mean", *results], table)


def codes_bytes(_: argparse.Namespace) -> None:
    """Measure what ColBERT codes of passages of 200 tokens take at 1,024 dimensions."""
    from chroma_server import ChromaServer
    from tiny_m3 import build

    print(machine() + "\n")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        embeddings = BGEM3Embeddings(model=str(build(Path(scratch) / "tiny", hidden=1_024)))
        chooser = random.Random(0)
        passages = [text_of(200, embeddings.count_tokens, chooser) for _ in range(PASSAGES)]
        for codes in ("", *CODES):
            options = options_of(codes)
            folder = Path(scratch) / f"folder {codes}".replace("/", "-")
            with open_chroma(embeddings, persist_directory=folder, **options) as store:
                index_documents(store, map(Document, passages))
            server = Path(scratch) / f"server {codes}".replace("/", "-")
            with ChromaServer(server) as chroma:
                store = open_chroma(embeddings, host=chroma.host, port=chroma.port, **options)
                index_documents(store, map(Document, passages))
            results[codes] = {"folder": size_of(folder), "server": size_of(server)}
    none = results.pop("")
    added = {
        codes: {place: (size - none[place]) / PASSAGES for place, size in sizes.items()}
        for codes, sizes in results.items()
    }
    rows = [
        [codes, *(f"{size:,.0f} B" for size in sizes.values())] for codes, sizes in added.items()
    ]
    show(["codes of a passage of 200 tokens", "in a folder", "on a server"], rows)
    finish("bytes of codes", added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    about = commands.add_parser("convert", help=convert.__doc__)
    about.add_argument("--data", type=Path, required=True, help="folder of xquad.en.json")
    about.add_argument("folder", type=Path, help="where the sets go")
    about.set_defaults(command=convert)
    for command in (run, weights):
        about = commands.add_parser(command.__name__, help=command.__doc__)
        about.add_argument("folders", type=Path, nargs="+", help="retrieval sets in BEIR's format")
        about.add_argument("--model", help="a BGE-M3 checkpoint; without it, the small model")
        about.add_argument("--split", default="test", help="name of the file in qrels")
        about.set_defaults(command=command)
        if command is run:
            about.add_argument("--colbert", nargs="*", default=CODES, help="1bit/2: pooled 2 to 1")
    commands.add_parser("bytes", help=codes_bytes.__doc__).set_defaults(command=codes_bytes)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
