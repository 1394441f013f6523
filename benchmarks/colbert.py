"""What ColBERT codes cost in time: when passages are indexed, and in each query.

    python benchmarks/build_checkpoint.py /tmp/bge-m3-random
    python benchmarks/colbert.py --model /tmp/bge-m3-random

Indexing: texts of 200 tokens with lexical weights, without codes and with them. Queries of about 30
tokens: passages with random vectors, weights and codes of 200 tokens; two signals and three by
turns, 50 candidates scored by ColBERT.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, machine, show, text_of
from langchain_core.documents import Document
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, index_vectors, open_chroma
from langchain_bge_dense.chroma.signals import Encoded, key_of, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_bge_dense._codes import Codec
    from langchain_bge_dense.chroma import BGEM3Chroma

TOKENS, TERMS = 200, 40  # of a passage; its terms with a lexical weight
WAYS: dict[str, dict[str, Any]] = {
    "1bit": {"colbert": "1bit"},
    "1bit, pooled 2 to 1": {"colbert": "1bit", "colbert_pooling": 2},
}
TWO, THREE = (0.4, 0.2, 0.0), (0.4, 0.2, 1.0)


def indexing(embeddings: BGEM3Embeddings, texts: list[str], rounds: int) -> dict[str, float]:
    """Median seconds to index the texts with each way to keep ColBERT vectors, by turns."""
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in WAYS}}
    for _ in range(rounds):
        for name, options in {"none": {}, **WAYS}.items():
            with tempfile.TemporaryDirectory() as folder:
                store = open_chroma(embeddings, persist_directory=folder, lexical=True, **options)
                store.passages.codec()  # once for a collection
                start = time.perf_counter()
                index_documents(store, map(Document, texts))
                seconds[name].append(time.perf_counter() - start)
                store.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def rows(codec: Codec, count: int) -> Iterator[tuple[Document, np.ndarray, bytes]]:
    """Passages with random vectors and codes."""
    chooser = np.random.default_rng(0)
    width, tokens = len(codec.mean), TOKENS // codec.pooling
    some = chooser.standard_normal((8, tokens, width)).astype(np.float32)
    whole = codec._replace(pooling=1)  # they are few enough by now
    codes = [whole.compress(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in some]
    for number in range(count):
        vector = chooser.standard_normal(width).astype(np.float32)
        yield Document(f"passage {number}", id=str(number)), vector, codes[number % len(codes)]


def fill(store: BGEM3Chroma, count: int) -> None:
    """Index so many passages, with token ids of Zipf's frequencies."""
    passages, chooser = store.passages, np.random.default_rng(1)
    codec = passages.codec()
    assert codec is not None
    fingerprint = store.embeddings.fingerprint  # type: ignore[union-attr]
    index_vectors(store, rows(codec, count), fingerprint=fingerprint, show_progress=True)
    for ids in batch_iterate(1_000, map(str, range(count))):
        tokens = np.minimum(chooser.zipf(1.1, (len(ids), TERMS)), 250_000).tolist()
        weights = chooser.random((len(ids), TERMS)).tolist()
        lexical = [dict(zip(*row, strict=True)) for row in zip(tokens, weights, strict=True)]
        keys = [key_of(number, f"passage {number}") for number in ids]
        passages.signals.put(
            keys, Encoded(np.empty((len(ids), 0), np.float32), list(map(pack, lexical)))
        )


def queries(
    embeddings: BGEM3Embeddings, texts: list[str], way: str, count: int
) -> dict[str, float]:
    """Median milliseconds of a query by two signals and by three."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_chroma(embeddings, persist_directory=folder, lexical=True, **WAYS[way])
        fill(store, count)
        [file] = Path(folder).glob("*.signals.sqlite3")
        size = file.stat().st_size / count
        retriever = BGEM3Retriever(vectorstore=store)
        times: dict[str, list[float]] = {"two": [], "three": []}
        for number, query in enumerate(texts):
            retriever.invoke(query)  # whoever comes second finds its candidates in the caches
            ways = (("two", TWO), ("three", THREE))
            for name, weights in ways if number % 2 else reversed(ways):
                start = time.perf_counter()
                retriever.invoke(query, weights=weights)
                times[name].append(time.perf_counter() - start)
        store.close()
    two, three = (statistics.median(values[2:]) * 1e3 for values in times.values())
    added = [b - a for a, b in zip(*(values[2:] for values in times.values()), strict=True)]
    return {
        "two signals": two,
        "three signals": three,
        "added": statistics.median(added) * 1e3,
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--passages", type=int, default=100_000, help="[%(default)s]")
    parser.add_argument("--texts", type=int, default=16, help="that are indexed [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="of indexing [%(default)s]")
    parser.add_argument("--queries", type=int, default=40, help="[%(default)s]")
    arguments = parser.parse_args()
    embeddings = BGEM3Embeddings(model=arguments.model).load()
    chooser, count = random.Random(0), embeddings.count_tokens
    passages = [text_of(TOKENS - 2, count, chooser) for _ in range(arguments.texts)]
    asked = [text_of(chooser.randint(24, 36), count, chooser) for _ in range(arguments.queries)]
    print(machine() + "\n")
    seconds = indexing(embeddings, passages, arguments.rounds)
    found = {way: queries(embeddings, asked, way, arguments.passages) for way in WAYS}
    table = [
        [
            way,
            f"{seconds[way] / seconds['none'] - 1:+.1%}",
            f"{row['bytes']:,.0f} B",
            f"{row['two signals']:.0f} ms",
            f"{row['three signals']:.0f} ms",
            f"{row['added']:.1f} ms",
        ]
        for way, row in found.items()
    ]
    header = ["codes", "indexing takes", "a passage", "dense + lexical", "all three", "added"]
    show(header, table)
    finish("colbert", {"seconds": seconds, "queries": found})


if __name__ == "__main__":
    main()
