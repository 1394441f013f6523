"""Tokens per second and query latency of every way to run BGE-M3, on one checkpoint in one run.

    python benchmarks/build_checkpoint.py /tmp/bge-m3-random
    python benchmarks/encode.py --model /tmp/bge-m3-random --chart docs/encode.png

Each contender runs in a process of its own, one after another, and all of them twice; the better of
the two runs counts, as other load on the machine can only slow a run down.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, machine, median_seconds, mixed_lengths, peak_memory, show, text_of

# Multiply-adds of the linear layers of BGE-M3 (24 layers, 1,024 wide), 2 FLOP each, per token.
FLOP_PER_TOKEN = 2 * 24 * (4 * 1024**2 + 2 * 1024 * 4096)
QUERY_TOKENS = (30, 10)

OURS = {
    "ours, torch float32": {"backend": "torch", "dtype": "float32"},
    "ours, torch bfloat16": {"backend": "torch", "dtype": "bfloat16"},
    "ours, OpenVINO float32": {"backend": "openvino", "dtype": "float32"},
    "ours, OpenVINO bfloat16": {"backend": "openvino", "dtype": "bfloat16"},
    "ours, OpenVINO int8": {"backend": "openvino", "dtype": "int8"},
}
FLAG, HUGGINGFACE, ST_OPENVINO = (
    "BGEM3FlagModel",
    "HuggingFaceEmbeddings",
    "sentence-transformers, OpenVINO",
)
EXACT = "ours, torch float32"
Embed = Callable[[list[str]], Any]


def flag_model(model: str) -> Embed:
    from FlagEmbedding import BGEM3FlagModel

    flag = BGEM3FlagModel(model)
    return lambda texts: flag.encode(texts)["dense_vecs"]


def huggingface(model: str) -> Embed:
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(model_name=model).embed_documents


def sentence_transformers_openvino(model: str) -> Embed:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, backend="openvino").encode


def ours(model: str, **settings: Any) -> Embed:
    from langchain_bge_dense import BGEM3Embeddings

    return BGEM3Embeddings(model=model, device="cpu", **settings).load().embed_documents


def loader(name: str) -> Callable[[str], Embed]:
    if name in OURS:
        return lambda model: ours(model, **OURS[name])
    others = {FLAG: flag_model, HUGGINGFACE: huggingface}
    return others.get(name, sentence_transformers_openvino)


def work(name: str, model: str, texts: Path, vectors: Path) -> dict[str, float]:
    """One contender's figures; runs in a process of its own."""
    warnings.simplefilter("ignore")
    content = json.loads(texts.read_text())
    start = time.perf_counter()
    embed = loader(name)(model)
    started = time.perf_counter() - start
    queries = content["queries"]
    embed(queries[:1])  # the first call of some runtimes compiles
    figures = {
        f"query of {tokens} tokens": median_seconds(lambda query=query: embed([query]), 7)
        for tokens, query in zip(QUERY_TOKENS, queries, strict=True)
    }
    results: list[Any] = []
    seconds = median_seconds(lambda: results.append(embed(content["corpus"])), 1)
    figures["tokens per second"] = content["tokens"] / seconds
    figures["start"] = started
    figures["peak memory"] = peak_memory()
    np.save(vectors, np.array(results[-1], dtype=np.float32))
    return figures


def matrix_peak() -> float:
    """Largest rate of a bfloat16 matrix product on this machine, in FLOP/s."""
    import torch

    rates = []
    with torch.inference_mode():
        for size in (2048, 4096):
            a, b = torch.randn(2, size, size).bfloat16()
            torch.mm(a, b)
            fastest = min(median_seconds(lambda a=a, b=b: torch.mm(a, b), 1) for _ in range(8))
            rates.append(2 * size**3 / fastest)
    return max(rates)


def write_texts(model: str, tokens: int, file: Path) -> int:
    from langchain_bge_dense import BGEM3Embeddings

    embeddings = BGEM3Embeddings(model=model, backend="torch", dtype="bfloat16")
    chooser = random.Random(0)
    lengths = mixed_lengths(tokens, chooser)
    corpus = [text_of(length - 2, embeddings.count_tokens, chooser) for length in lengths]
    queries = [text_of(length - 2, embeddings.count_tokens, chooser) for length in QUERY_TOKENS]
    tokens = sum(embeddings.count_tokens(text) + 2 for text in corpus)
    file.write_text(json.dumps({"corpus": corpus, "queries": queries, "tokens": tokens}))
    return tokens


def contenders(arguments: argparse.Namespace) -> dict[str, str]:
    """Names and the Python that runs each."""
    chosen = dict.fromkeys((FLAG, HUGGINGFACE, ST_OPENVINO, *OURS), sys.executable)
    chosen[ST_OPENVINO] = arguments.openvino_python
    return {n: p for n, p in chosen.items() if p and (not arguments.only or arguments.only in n)}


def run(name: str, python: str, model: str, folder: Path) -> dict[str, float]:
    command = [python, __file__, "--model", model, "--worker", name, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment["XDG_CACHE_HOME"] = str(folder)  # so that the first start converts
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def better(first: dict[str, float] | None, second: dict[str, float]) -> dict[str, float]:
    if first is None:
        return {
            "first start": second["start"],
            "first peak memory": second["peak memory"],
            **second,
        }
    rate = "tokens per second"
    best = {k: max(first[k], v) if k == rate else min(first[k], v) for k, v in second.items()}
    return {**first, **best}


def lowest_cosine(name: str, folder: Path) -> float | None:
    if name not in (*OURS, FLAG) or not vectors_file(folder, EXACT).exists():
        return None
    exact = np.load(vectors_file(folder, EXACT))
    return float((np.load(vectors_file(folder, name)) * exact).sum(axis=1).min())


def vectors_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace(',', '')}.npy"


def table(
    results: dict[str, dict[str, float]], cosines: dict[str, float | None], peak: float
) -> None:
    others = [name for name in (FLAG, HUGGINGFACE, ST_OPENVINO) if name in results]
    rows = []
    for name, figures in results.items():
        rate = figures["tokens per second"]
        cosine = cosines[name]
        rows.append(
            [
                name,
                f"{rate:,.0f}",
                *(f"{rate / results[other]['tokens per second']:.1f}x" for other in others),
                *(query_cell(figures, results.get(FLAG), tokens) for tokens in QUERY_TOKENS),
                f"{rate * FLOP_PER_TOKEN / peak:.0%}",
                "" if cosine is None else f"{cosine:.5f}",
            ]
        )
    header = ["encoder", "tokens/s", *(f"÷ {other}" for other in others)]
    header += [f"query, {tokens} tokens" for tokens in QUERY_TOKENS]
    show([*header, "of bf16 peak", "lowest cosine to fp32"], rows)


def query_cell(figures: dict[str, float], flag: dict[str, float] | None, tokens: int) -> str:
    key = f"query of {tokens} tokens"
    times = f", {flag[key] / figures[key]:.1f}x" if flag else ""
    return f"{figures[key] * 1e3:.0f} ms{times}"


def start_table(results: dict[str, dict[str, float]]) -> None:
    keys = ("first start", "start", "first peak memory", "peak memory")
    units = ("s", "s", "GiB", "GiB")
    rows = [
        [name, *(f"{figures[key]:.1f} {unit}" for key, unit in zip(keys, units, strict=True))]
        for name, figures in results.items()
    ]
    show(["encoder", "first start", "next start", "peak memory", "after the next start"], rows)


def chart(results: dict[str, dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)
    rates = [results[name]["tokens per second"] for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1), layout="constrained")
    colours = ["#2a6f97" if name in OURS else "#b8b8b8" for name in names]
    axes.bar_label(axes.barh(names, rates, color=colours), fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(rates) * 1.1)
    axes.set_xlabel("tokens per second, mixed lengths, two CPU cores")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument(
        "--openvino-python", help="Python with benchmarks/requirements-openvino.txt"
    )
    parser.add_argument("--tokens", type=int, default=6_000, help="of the corpus")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help="contenders whose name holds this")
    parser.add_argument("--chart", type=Path, help="write a bar chart here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder = arguments.folder
        vectors = vectors_file(folder, arguments.worker)
        print(json.dumps(work(arguments.worker, arguments.model, folder / "texts.json", vectors)))
        return
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_texts(arguments.model, arguments.tokens, folder / "texts.json")
        peak = matrix_peak()
        print(
            f"{machine()}\n\nCorpus of {tokens:,} tokens. "
            f"Peak of the bf16 matrix product: {peak / 1e9:.0f} GFLOP/s\n"
        )
        for _ in range(arguments.rounds):
            for contender, python in contenders(arguments).items():
                figures = run(contender, python, arguments.model, folder)
                results[contender] = better(results.get(contender), figures)
                print(f"{contender}: {figures['tokens per second']:.0f} tokens/s", file=sys.stderr)
        cosines = {contender: lowest_cosine(contender, folder) for contender in results}
    table(results, cosines, peak)
    print()
    start_table(results)
    finish("encode", {"peak": peak, "figures": results, "cosines": cosines})
    if arguments.chart:
        chart(results, arguments.chart)


if __name__ == "__main__":
    main()
