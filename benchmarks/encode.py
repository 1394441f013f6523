"""Tokens per second, latency and memory of every way to run BGE-M3, on one checkpoint in one run.

    python benchmarks/build_checkpoint.py /tmp/bge-m3-random
    python benchmarks/encode.py --model /tmp/bge-m3-random --chart benchmarks/encode.png
    python benchmarks/encode.py --model /tmp/bge-m3-random --long
    python benchmarks/encode.py --model /tmp/bge-m3-random --busy
    python benchmarks/encode.py --model /tmp/bge-m3-random --device cuda

Each contender runs in a process of its own, one after another. "Cold" is the first pass over a
corpus, with lengths that the process has not seen; "warm" is the second pass over the same one.
Queries are all different, of 24 to 36 and of 8 to 12 tokens. A start is from the start of the
process until its first vector.
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
import peers
from common import (
    finish,
    forget_peak,
    instructions,
    machine,
    mixed_lengths,
    peak_memory,
    resident_memory,
    show,
    text_of,
)

# Multiply-adds of the linear layers of BGE-M3 (24 layers, 1,024 wide), 2 FLOP each, per token.
FLOP_PER_TOKEN = 2 * 24 * (4 * 1024**2 + 2 * 1024 * 4096)
QUERIES = {"query of 30 tokens": (24, 36), "query of 10 tokens": (8, 12)}
QUERY_COUNT = 15
LONG = (512, 2_048, 8_190)
SHORT_TEXTS = 1_000  # embedded before memory is read

FLAG, HUGGINGFACE = "BGEM3FlagModel", "HuggingFaceEmbeddings"
ST_OPENVINO, ST_FLOAT16 = "sentence-transformers, OpenVINO", "sentence-transformers, float16"
EXACT = "ours, float32"
RATIOS = (FLAG, HUGGINGFACE, ST_OPENVINO, ST_FLOAT16, "ONNX Runtime, int8")
OURS = {
    EXACT: {"dtype": "float32"},
    "ours, bfloat16": {"dtype": "bfloat16"},
    "ours, int8": {"dtype": "int8"},
    "ours, float16": {"dtype": "float16"},
}
ONNX = {f"ONNX Runtime, {dtype}": f"onnx-{dtype}/model.onnx" for dtype in ("float32", "int8")}
LLAMA = {f"llama.cpp, {kind}": f"{kind}.gguf" for kind in ("F16", "Q8_0")}
CONTENDERS = {
    "cpu": (FLAG, HUGGINGFACE, ST_OPENVINO, *ONNX, *LLAMA, EXACT, "ours, bfloat16", "ours, int8"),
    "cuda": (FLAG, HUGGINGFACE, ST_FLOAT16, EXACT, "ours, bfloat16", "ours, float16"),
}
BEST: dict[str, tuple[str, float, Callable[..., str]]] = {  # key, unit, which is best
    "tokens per second, mixed lengths": ("warm", 1, max),
    **{f"{query}, ms": (query, 1e3, min) for query in QUERIES},
    "start, s": ("start", 1, min),
    "memory when started, GiB": ("started", 1, min),
}
OURS_COLOUR, PEER_COLOURS = "#2a6f97", ("#c8c8c8", "#6b6b6b")
Embed = Callable[[list[str]], Any]


def flag_model(model: str, device: str) -> Embed:
    from FlagEmbedding import BGEM3FlagModel

    flag = BGEM3FlagModel(model, use_fp16=device != "cpu", devices=device)
    return lambda texts: flag.encode(texts, max_length=8_192)["dense_vecs"]


def huggingface(model: str, device: str) -> Embed:
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(model_name=model, model_kwargs={"device": device})
    return peers.with_little_padding(model, embeddings.embed_documents)


def sentence_transformers_openvino(model: str, _device: str) -> Embed:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, backend="openvino")
    return peers.with_little_padding(model, encoder.encode)


def sentence_transformers_float16(model: str, device: str) -> Embed:
    from sentence_transformers import SentenceTransformer

    settings = {"torch_dtype": "float16"}
    encoder = SentenceTransformer(model, device=device, model_kwargs=settings)
    return peers.with_little_padding(model, encoder.encode)


def loader(name: str, arguments: argparse.Namespace) -> Callable[[str], Embed]:
    if name in ONNX:
        return lambda model: peers.onnx_runtime(model, arguments.peers / ONNX[name])
    if name in LLAMA:
        return lambda model: peers.llama_cpp(model, arguments.peers / LLAMA[name])
    settings = OURS.get(name)
    if settings is None:
        others = {
            FLAG: flag_model,
            HUGGINGFACE: huggingface,
            ST_OPENVINO: sentence_transformers_openvino,
            ST_FLOAT16: sentence_transformers_float16,
        }
        return lambda model: others[name](model, arguments.device)

    def ours(model: str) -> Embed:
        from langchain_bge_dense import BGEM3Embeddings

        embeddings = BGEM3Embeddings(model=model, device=arguments.device, **settings)
        return embeddings.load().embed_documents

    return ours


def work(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One contender's figures; runs in a process of its own."""
    warnings.simplefilter("ignore")
    content = json.loads((arguments.folder / "texts.json").read_text())
    embed = loader(name, arguments)(arguments.model)
    embed(content["warm-up"][:1])  # some read their weights with the first text
    figures = {"start": time.time() - arguments.started, "peak while starting": peak_memory()}
    figures["started"] = resident_memory()
    embed(content["warm-up"])  # the first calls of some runtimes compile
    if arguments.long:
        return {**figures, **long_texts(embed, content)}
    if arguments.busy:
        return {**figures, **beside_busy(embed, content[next(iter(QUERIES))])}
    for key in QUERIES:
        figures[key] = float(np.median([seconds(embed, [query]) for query in content[key]]))
    corpus = content["corpus"]
    figures["cold"] = content["tokens"] / seconds(embed, corpus)
    vectors: list[Any] = []
    warm = seconds(lambda texts: vectors.append(embed(texts)), corpus)
    figures["warm"] = content["tokens"] / warm
    figures["after the corpus"] = resident_memory()
    np.save(vectors_file(arguments.folder, name), np.array(vectors[0], dtype=np.float32))
    if name in OURS:
        embed(content["short"])
        figures["after 1,000 texts"] = resident_memory()
    return figures


def beside_busy(embed: Embed, queries: list[str]) -> dict[str, float]:
    """The median query alone, and beside one busy process for each core."""

    def median() -> float:
        return float(np.median([seconds(embed, [query]) for query in queries]))

    alone = median()
    loop = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(loop) for _ in range(os.cpu_count() or 1)]
    try:
        return {"alone": alone, "busy": median()}
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def long_texts(embed: Embed, content: dict[str, Any]) -> dict[str, float]:
    """Tokens per second and memory on top of the loaded model, for one text of each length."""
    figures = {}
    for length in LONG:
        forget_peak()
        before = resident_memory()
        times = [seconds(embed, [content[str(length)]]) for _ in range(max(1, 4_096 // length))]
        figures[f"{length:,} tokens"] = length / float(np.median(times))
        figures[f"{length:,} tokens, memory"] = max(0.0, peak_memory() - before)
    return figures


def seconds(function: Callable[[list[str]], Any], texts: list[str]) -> float:
    start = time.perf_counter()
    function(texts)
    return time.perf_counter() - start


def matrix_peak(device: str) -> tuple[str, float]:
    """The dtype that is fastest here, and the largest rate of its matrix product, in FLOP/s."""
    import torch

    from langchain_bge_dense._engine.linear import cpu_is_fast_in_bf16

    # Without bfloat16 in hardware its products are emulated, and take minutes.
    dtype = torch.bfloat16 if device != "cpu" or cpu_is_fast_in_bf16() else torch.float32
    rates = []
    with torch.inference_mode():
        for size in (2048, 4096):
            a, b = torch.randn(2, size, size).to(device, dtype)
            for _ in range(9):
                start = time.perf_counter()
                torch.mm(a, b)[0, 0].item()  # waits for the device
                rates.append(2 * size**3 / (time.perf_counter() - start))
    return str(dtype).removeprefix("torch."), max(rates)


def padded(texts: list[str], count: Callable[[str], int]) -> int:
    """Tokens in batches of 32 by length, the way sentence-transformers pads a corpus."""
    lengths = [count(text) + 2 for text in sorted(texts, key=len, reverse=True)]
    batches = (lengths[start : start + 32] for start in range(0, len(lengths), 32))
    return sum(len(batch) * max(batch) for batch in batches)


def write_texts(arguments: argparse.Namespace, file: Path) -> tuple[int, float]:
    """Write the texts; gives the tokens of the corpus, and how many times as many are padded."""
    from langchain_bge_dense import BGEM3Embeddings

    count = BGEM3Embeddings(model=arguments.model, device="cpu").count_tokens
    chooser = random.Random(0)

    def text(length: int) -> str:
        return text_of(length - 2, count, chooser)

    content: dict[str, Any] = {"warm-up": [text(length) for length in (30, 100)]}
    content["corpus"] = [text(length) for length in mixed_lengths(arguments.tokens, chooser)]
    content["tokens"] = sum(count(passage) + 2 for passage in content["corpus"])
    for key, bounds in QUERIES.items():
        content[key] = [text(chooser.randint(*bounds)) for _ in range(QUERY_COUNT)]
    content["short"] = [text(chooser.randint(5, 15)) for _ in range(SHORT_TEXTS)]
    if arguments.long:
        content |= {str(length): text(length) for length in LONG}
    file.write_text(json.dumps(content))
    tokens = int(content["tokens"])
    return tokens, padded(content["corpus"], count) / tokens


def contenders(arguments: argparse.Namespace) -> list[str]:
    names = CONTENDERS[arguments.device.partition(":")[0]]
    return [
        name
        for name in names
        if python_of(name, arguments) is not None
        and any(part in name for part in arguments.only or [""])
    ]


def python_of(name: str, arguments: argparse.Namespace) -> str | None:
    """The interpreter of a contender; None for a peer that was not asked for."""
    pythons: dict[str, str | None] = {
        ST_OPENVINO: arguments.openvino_python,
        **dict.fromkeys(ONNX, arguments.onnx_python),
        **dict.fromkeys(LLAMA, arguments.llama_python),
    }
    return pythons.get(name, sys.executable)


def run(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    options = {"model": arguments.model, "device": arguments.device, "worker": name}
    options |= {"folder": folder, "peers": arguments.peers}
    command = [str(python_of(name, arguments)), __file__]
    command += [f"--{option}={value}" for option, value in options.items()]
    command += [f"--{mode}" for mode in ("long", "busy") if getattr(arguments, mode)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment["LANGCHAIN_BGE_DENSE_CACHE"] = str(folder / "packed")
    if name in OURS:  # a first load, as the models of peers were converted before
        subprocess.run([*command, "--load"], check=True, env=environment)
    command += [f"--started={time.time()}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures = dict(json.loads(done.stdout.splitlines()[-1]))
    print(f"{name}: {figures}", file=sys.stderr)
    return figures


def lowest_cosine(name: str, folder: Path) -> float | None:
    exact = vectors_file(folder, EXACT)
    if not exact.exists():
        return None
    return float((np.load(vectors_file(folder, name)) * np.load(exact)).sum(axis=1).min())


def vectors_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace(',', '')}.npy"


def speed_table(
    results: dict[str, dict[str, float]], cosines: dict[str, float | None], peak: float, dtype: str
) -> None:
    others = [name for name in RATIOS if name in results]
    rows = []
    for name, figures in results.items():
        rate, cosine = figures["warm"], cosines[name]
        ratios = [f"{rate / results[other]['warm']:.1f}x" for other in others]
        queries = [query_cell(figures, results.get(FLAG), key) for key in QUERIES]
        share = f"{rate * FLOP_PER_TOKEN / peak:.0%}"
        exactness = "" if cosine is None else f"{cosine:.5f}"
        rows.append(
            [name, f"{figures['cold']:,.0f}", f"{rate:,.0f}", *ratios, *queries, share, exactness]
        )
    header = ["encoder", "tokens/s, cold", "warm", *(f"÷ {other}" for other in others), *QUERIES]
    show([*header, f"of {dtype} peak", "lowest cosine to float32"], rows)


def query_cell(figures: dict[str, float], flag: dict[str, float] | None, key: str) -> str:
    times = f", {flag[key] / figures[key]:.1f}x" if flag else ""
    return f"{figures[key] * 1e3:.0f} ms{times}"


def memory_table(results: dict[str, dict[str, float]]) -> None:
    keys = ("peak while starting", "started", "after the corpus", "after 1,000 texts")
    rows = [
        [name, f"{f['start']:.1f} s", *(f"{f[key]:.2f} GiB" if key in f else "" for key in keys)]
        for name, f in results.items()
    ]
    show(["encoder", "start", *keys], rows)


def best_table(results: dict[str, dict[str, float]]) -> None:
    """The best of ours and of the others in each figure, also where ours is not ahead."""
    rows = []
    for label in BEST:
        values = {ours: best_of(results, label, ours=ours) for ours in (True, False)}
        cells = [f"{name}: {value:,.{0 if value >= 10 else 2}f}" for name, value in values.values()]
        rows.append([label, *cells, f"{values[True][1] / values[False][1]:.2f}"])
    show(["best in", "of ours", "of the others", "ours ÷ others"], rows)


def best_of(results: dict[str, dict[str, float]], label: str, *, ours: bool) -> tuple[str, float]:
    """The name and the value of the best contender of ours, or of the others."""
    key, unit, best = BEST[label]
    values = {name: f[key] * unit for name, f in results.items() if (name in OURS) == ours}
    name = best(values, key=values.__getitem__)
    return name, values[name]


def busy_table(results: dict[str, dict[str, float]]) -> None:
    rows = []
    for name, figures in results.items():
        alone, busy = figures["alone"], figures["busy"]
        rows.append([name, f"{alone * 1e3:.0f} ms", f"{busy * 1e3:.0f} ms", f"{busy / alone:.1f}x"])
    show(["query of 30 tokens", "alone", "beside a busy process per core", "ratio"], rows)


def long_table(results: dict[str, dict[str, float]]) -> None:
    keys = [f"{length:,} tokens" for length in LONG]
    rows = [
        [name, *(f"{f[key]:,.0f}, {f[f'{key}, memory']:.2f} GiB" for key in keys)]
        for name, f in results.items()
    ]
    show(["tokens/s and extra memory for one text of", *keys], rows)


def chart(results: dict[str, dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    size = (10, 0.4 * len(results) + 1)
    figure, both = plt.subplots(1, 2, sharey=True, figsize=size, layout="constrained")
    for axes, label in zip(both, BEST, strict=False):  # a corpus and a query
        panel(axes, results, label)
    both[0].invert_yaxis()
    title = f"CPU with {instructions().split(',')[0]}; blue: ours, dark: the best of the others"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(file, dpi=110)


def panel(axes: Any, results: dict[str, dict[str, float]], label: str) -> None:
    key, unit, _ = BEST[label]
    peers_too = not results.keys() <= OURS.keys()
    best = best_of(results, label, ours=False)[0] if peers_too else None
    colours = [OURS_COLOUR if n in OURS else PEER_COLOURS[n == best] for n in results]
    values = [figures[key] * unit for figures in results.values()]
    axes.bar_label(axes.barh(list(results), values, color=colours), fmt="{:,.0f}", padding=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel(label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint of BGE-M3's size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--long", action="store_true", help="single texts of up to 8,190 tokens")
    parser.add_argument("--busy", action="store_true", help="queries beside busy processes")
    parser.add_argument(
        "--openvino-python", help="Python with benchmarks/requirements-openvino.txt"
    )
    parser.add_argument("--onnx-python", help="Python with benchmarks/requirements-onnx.txt")
    parser.add_argument("--llama-python", help="Python with benchmarks/requirements-llama.txt")
    parser.add_argument("--peers", type=Path, help="the folder that peers.py wrote for these two")
    parser.add_argument("--tokens", type=int, default=6_000, help="of the corpus")
    parser.add_argument("--only", nargs="+", help="contenders whose name holds one of these")
    parser.add_argument("--chart", type=Path, help="write a bar chart here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())) != str(os.cpu_count()):
        parser.error("OMP_NUM_THREADS holds some contenders to fewer cores than others. Unset it.")
    if arguments.load:
        loader(arguments.worker, arguments)(arguments.model)
        return
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments)))
        return
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, padding = write_texts(arguments, folder / "texts.json")
        dtype, peak = matrix_peak(arguments.device)
        print(
            f"{machine()}\n\nCorpus of {tokens:,} tokens; sentence-transformers' own batches, not "
            f"used here, would make them {padding:.2f} times as many. "
            f"Peak of the {dtype} matrix product: {peak / 1e9:,.0f} GFLOP/s\n"
        )
        results = {name: run(name, arguments, folder) for name in contenders(arguments)}
        if arguments.long:
            long_table(results)
            finish("encode --long", {"peak": peak, "figures": results})
            return
        if arguments.busy:
            busy_table(results)
            finish("encode --busy", results)
            return
        cosines = {contender: lowest_cosine(contender, folder) for contender in results}
    speed_table(results, cosines, peak, dtype)
    print()
    memory_table(results)
    print()
    if len({name in OURS for name in results}) == 2:
        best_table(results)
    finish("encode", {"peak": peak, "figures": results, "cosines": cosines})
    if arguments.chart:
        chart(results, arguments.chart)


if __name__ == "__main__":
    main()
