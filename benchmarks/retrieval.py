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
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from beir_format import MEASURES, RetrievalSet, measures, write
from common import finish, machine, median_seconds, show, text_of
from langchain_core.documents import Document
from quality import read, small

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense._scoring import maxsim_scores, score_key
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from langchain_bge_dense.chroma import BGEM3Chroma

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CODES = ("int8", "2bit", "1bit", "1bit/2")
SIGNALS = ("dense", "sparse", "multi-vector", "dense + sparse", "all")
PUBLISHED = {
    "miracl": ("dev, nDCG@10, mean of 18 languages", (69.2, 53.9, 70.5, 70.4, 71.5)),
    "mkqa": ("Recall@100, mean of 25 languages", (75.1, 45.3, 75.3, 75.3, 75.5)),
    "mldr": ("test, nDCG@10, mean of 13 languages", (52.5, 62.2, 57.6, 64.8, 65.0)),
    "narrativeqa": ("nDCG@10", (48.7, 57.5, 55.4, 60.1, 61.7)),
}
TIMED = 10  # queries whose ColBERT vectors are computed at query time: it takes seconds
FETCH = 100  # candidates of each of the dense and the lexical signal
TRACE = 1e-9  # a weight that has a signal scored, and changes no order
BATCH = 256
CALLERS = 16  # that wait together share a forward pass
FUSIONS = ("standard", "raw", "rrf")
DEPTHS = (20, 50, 100)  # candidates that ColBERT scores
DEPTH = 50
RRF_K = 60
SHOWN = 10
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
    for language in ("en", "zh"):
        texts = read(arguments.data / f"xquad.{language}.json")
        write(arguments.folder / f"xquad-{language}", *texts)
    write(arguments.folder / "docstrings", *docstrings(600))


@dataclass(frozen=True)
class Candidates:
    """What dense and lexical search find for `Q` queries, at most `C` for each, best dense first.

    Attributes:
        ids: Passage ids, by query.
        scores: Dense, lexical and exact ColBERT score, `(3, Q, C)`; NaN where a query has fewer.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, store: BGEM3Chroma, queries: list[str]) -> Candidates:
        """The best `FETCH` passages of each signal, their ColBERT scores computed anew."""
        found = candidates(store, queries)
        scores = np.full((3, len(found), max(map(len, found))), np.nan, np.float32)  # (3, Q, C)
        for row, passages in enumerate(found):
            scores[:2, row, : len(passages)] = [
                [document.metadata[score_key(signal)] for document in passages.values()]
                for signal in ("dense", "lexical")
            ]
        ids = [list(passages) for passages in found]
        texts = {key: d.page_content for passages in found for key, d in passages.items()}
        add_colbert(store.embeddings, queries, texts, ids, scores[2])
        return cls(ids, scores)


def candidates(store: BGEM3Chroma, queries: list[str]) -> list[dict[str, Any]]:
    """Documents by id with dense and lexical scores, best dense first, of each query."""
    retriever = BGEM3Retriever(vectorstore=store, k=FETCH, fetch_k=FETCH, scores=True)
    by_signal = [
        retriever.batch(queries, {"max_concurrency": CALLERS}, weights=weights)
        for weights in ((1, TRACE, 0), (TRACE, 1, 0))
    ]
    return [
        {d.id: d for d in sorted(chain(*lists), key=lambda d: -d.metadata[score_key("dense")])}
        for lists in zip(*by_signal, strict=True)
    ]


def add_colbert(
    embeddings: Any,
    queries: list[str],
    texts: dict[str, str],
    ids: list[list[str]],
    scores: NDArray[np.float32],
) -> None:
    """Write MaxSim scores into `(Q, C)`; each passage is encoded once, a batch at a time."""
    encoded = embeddings.encode(
        queries, dense=False, colbert=True, instruction=embeddings.query_instruction
    ).colbert
    asked: dict[str, list[tuple[int, int]]] = {passage: [] for passage in texts}
    for row, passages in enumerate(ids):
        for column, passage in enumerate(passages):
            asked[passage].append((row, column))
    for batch in batches(list(texts), BATCH):
        vectors = embeddings.encode([texts[key] for key in batch], dense=False, colbert=True)
        for passage, tokens in zip(batch, vectors.colbert, strict=True):
            for row, column in asked[passage]:
                scores[row, column] = maxsim_scores(encoded[row], [tokens])[0]


def batches(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def fused(
    scores: NDArray[np.float32], weights: tuple[float, float, float], fusion: str, depth: int
) -> NDArray[np.float32]:
    """What `BGEM3Retriever` orders candidates by, `(Q, C)`; -inf for those that it drops.

    Args:
        scores: Of the three signals, `(3, Q, C)`.
        weights: Of the three signals.
        fusion: Brings scores to one scale.
        depth: Candidates that ColBERT scores, the best of dense and lexical.
    """
    dense, lexical, colbert = scores
    fetch = max(50, depth)
    found = descending_ranks(dense) < fetch  # (Q, C)
    if weights[1]:
        found |= descending_ranks(lexical) < fetch
    parts = [
        weight * scaled(np.where(found, signal, np.nan), fusion)
        for signal, weight in zip((dense, lexical), weights[:2], strict=True)
    ]
    total = np.where(found, sum(parts), -np.inf)  # (Q, C)
    if weights[2]:
        scored = found & (descending_ranks(total) < depth)
        total += weights[2] * scaled(np.where(scored, colbert, np.nan), fusion)
        total = np.where(scored, total, -np.inf)
    return total


def scaled(scores: NDArray[np.float32], fusion: str) -> NDArray[np.float32]:
    """Scores `(Q, C)` on the scale of a fusion; NaN stays NaN."""
    if fusion == "raw":
        return scores
    if fusion == "rrf":
        return np.where(np.isnan(scores), np.nan, 1 / (RRF_K + 1 + descending_ranks(scores)))
    spread = np.maximum(np.nanstd(scores, axis=1, keepdims=True), 1e-6)  # (Q, 1)
    return (scores - np.nanmean(scores, axis=1, keepdims=True)) / spread


def descending_ranks(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank of each score in its row, from 0, `(Q, C)`; NaN comes last."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], axis=1)
    return ranks


def ranked(ids: list[list[str]], total: NDArray[np.float32], most: int) -> list[list[str]]:
    """Passage ids by fused score, the best first, `most` of each query."""
    order = np.argsort(-total, axis=1, kind="stable")[:, :most]  # (Q, most)
    return [
        [passages[n] for n in row if n < len(passages) and scores[n] > -np.inf]
        for passages, row, scores in zip(ids, order.tolist(), total, strict=True)
    ]


def grid() -> Iterator[tuple[str, int, tuple[float, float, float]]]:
    """Fusion, depth and weights that sum to 1, in steps of a tenth."""
    weights = [
        (dense / 10, lexical / 10, (10 - dense - lexical) / 10)
        for dense in range(11)
        for lexical in range(11 - dense)
    ]
    for fusion, depth, chosen in product(FUSIONS, DEPTHS, weights):
        if chosen[2] or depth == DEPTHS[0]:  # without ColBERT there is no depth
            yield fusion, depth, chosen


def run(arguments: argparse.Namespace) -> None:
    """Measure each signal, and all of them, on retrieval sets."""
    print(machine() + "\n")
    embeddings = embeddings_of(arguments)
    print(f"{embeddings.fingerprint}\n")
    results = {}
    for folder in arguments.folders:
        texts = RetrievalSet.read(folder, arguments.split)
        rows = {"": without_codes(embeddings, texts)}
        for codes in arguments.colbert:
            rows[codes] = with_codes(embeddings, texts, codes)
        results[texts.name] = {name: row for part in rows.values() for name, row in part.items()}
        show_set(texts, results[texts.name])
    finish("retrieval", results)


def embeddings_of(arguments: argparse.Namespace) -> BGEM3Embeddings:
    return BGEM3Embeddings(model=arguments.model or small(), on_truncate="ignore")


@contextmanager
def filled(embeddings: Any, texts: RetrievalSet, **options: Any) -> Iterator[tuple[Any, int]]:
    """A store of the set's passages in a folder, and the bytes that it takes there, a passage."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_chroma(
            embeddings, texts.name, persist_directory=folder, lexical=True, **options
        )
        index_documents(store, texts.documents())
        count = len(store.get(include=[])["ids"])
        yield store, size_of(Path(folder)) // count
        store.close()


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def without_codes(embeddings: Any, texts: RetrievalSet) -> dict[str, dict[str, float]]:
    """The first two signals, and ColBERT from vectors computed at query time."""
    with filled(embeddings, texts) as (store, taken):
        rows = {
            "dense": search(BGEM3Retriever(vectorstore=store, weights=(1, 0, 0)), texts),
            "lexical": search(BGEM3Retriever(vectorstore=store, weights=(0, 1, 0)), texts),
            "dense + lexical": search(BGEM3Retriever(vectorstore=store), texts),
        }
        found = Candidates.of(store, list(texts.queries.values()))
        for name, weights in colbert_weights().items():
            retriever = with_colbert(store, weights)
            questions = list(texts.queries.values())[:TIMED]
            rows[f"{name}, exact"] = {
                **exact(texts, found, weights),
                "ms": median_ms(retriever, questions),
            }
    return {name: {**row, "bytes": taken} for name, row in rows.items()}


def with_codes(embeddings: Any, texts: RetrievalSet, codes: str) -> dict[str, dict[str, float]]:
    """ColBERT from codes, `codes` as the command line has it."""
    with filled(embeddings, texts, **options_of(codes)) as (store, taken):
        return {
            f"{name}, {codes}": {
                **search(with_colbert(store, weights), texts),
                "bytes": taken,
            }
            for name, weights in colbert_weights().items()
        }


def options_of(codes: str) -> dict[str, Any]:
    """Arguments of `open_chroma` for codes as the command line has them, `"1bit/2"` for example."""
    kind, _, pooling = codes.partition("/")
    return {"colbert": kind or None, "colbert_pooling": int(pooling or 1)}


def with_colbert(store: Any, weights: tuple[float, float, float]) -> BGEM3Retriever:
    return BGEM3Retriever(vectorstore=store, k=10, weights=weights, colbert=True, colbert_k=DEPTH)


def colbert_weights() -> dict[str, tuple[float, float, float]]:
    return {"ColBERT": (0, 0, 1), "all three": default("weights")}


def default(field: str) -> Any:
    """What `BGEM3Retriever` takes when nobody says."""
    return BGEM3Retriever.model_fields[field].default


def search(retriever: BGEM3Retriever, texts: RetrievalSet) -> dict[str, float]:
    """Measures of the first 10 as one call gives them, R@100 of another, and the time of one."""
    questions = list(texts.queries.values())
    retriever.invoke(questions[0])  # reads the index
    first, seconds = [], []
    for question in questions:
        start = time.perf_counter()
        first.append(retriever.invoke(question, k=10))
        seconds.append(time.perf_counter() - start)
    hundred = retriever.batch(questions, {"max_concurrency": CALLERS}, k=100)
    by_depth = [
        measures(texts.relevant, dict(zip(texts.queries, map(ids_of, lists), strict=True)))
        for lists in (first, hundred)
    ]
    return {
        **by_depth[0],
        "R@100": by_depth[1]["R@100"],
        "ms": statistics.median(seconds) * 1e3,
    }


def ids_of(documents: list[Document]) -> list[str]:
    return [str(document.id) for document in documents]


def median_ms(retriever: BGEM3Retriever, questions: list[str]) -> float:
    remaining = iter(questions)
    return median_seconds(lambda: retriever.invoke(next(remaining)), len(questions)) * 1e3


def exact(
    texts: RetrievalSet, found: Candidates, weights: tuple[float, float, float]
) -> dict[str, float]:
    """What the retriever would find with vectors computed at query time."""
    rankings = {
        depth: ranked(found.ids, fused(found.scores, weights, default("fusion"), depth), depth)
        for depth in (DEPTH, 100)
    }
    first, hundred = (
        measures(texts.relevant, dict(zip(texts.queries, lists, strict=True)))
        for lists in rankings.values()
    )
    return {**first, "R@100": hundred["R@100"]}


def show_set(texts: RetrievalSet, rows: dict[str, dict[str, float]]) -> None:
    print(f"{texts.name}: {len(texts.queries):,} queries\n")
    table = [
        [
            name,
            *(f"{row[measure]:.4f}" for measure in MEASURES),
            f"{row['bytes']:,}",
            f"{row['ms']:.0f} ms",
        ]
        for name, row in rows.items()
    ]
    show(["signals", *MEASURES, "bytes a passage", "a query"], table)
    for name, (source, figures) in PUBLISHED.items():
        if texts.name.lower().startswith(name):
            print(f"\nBGE-M3 as published (arXiv:2402.03216), {source}:\n")
            show(SIGNALS, [figures])
    print()


def weights(arguments: argparse.Namespace) -> None:
    """Find the weights, fusion and depth that put the right passages first."""
    print(machine() + "\n")
    embeddings = embeddings_of(arguments)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for folder in arguments.folders:
        texts = RetrievalSet.read(folder, arguments.split)
        with filled(embeddings, texts) as (store, _):
            found = Candidates.of(store, list(texts.queries.values()))
        results[texts.name] = {
            name_of(*setting): score(texts, found, *setting) for setting in grid()
        }
    show_weights(results)
    finish("weights", results)


def show_weights(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """The settings with the highest nDCG@10, on average over the sets and on each."""
    names = list(next(iter(results.values())))
    mean = {name: np.mean([rows[name]["nDCG@10"] for rows in results.values()]) for name in names}
    best = sorted(names, key=lambda name: -mean[name])[:SHOWN]
    for rows in results.values():
        best += sorted(names, key=lambda name: -rows[name]["nDCG@10"])[:3]
    table = [
        [name, *(f"{rows[name][m]:.4f}" for rows in results.values() for m in ("nDCG@10", "R@1"))]
        for name in dict.fromkeys(best)
    ]
    show(["setting", *(f"{name}: {m}" for name in results for m in ("nDCG@10", "R@1"))], table)


def name_of(fusion: str, depth: int, weights: tuple[float, float, float]) -> str:
    return f"{fusion}, {' / '.join(f'{weight:g}' for weight in weights)}, depth {depth}"


def score(
    texts: RetrievalSet,
    found: Candidates,
    fusion: str,
    depth: int,
    weights: tuple[float, float, float],
) -> dict[str, float]:
    rankings = ranked(found.ids, fused(found.scores, weights, fusion, depth), 10)
    return measures(texts.relevant, dict(zip(texts.queries, rankings, strict=True)))


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
