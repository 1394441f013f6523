"""What the benchmarks share: the machine's name, texts of given token counts, tables."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

LIBRARIES = ["torch", "transformers", "FlagEmbedding", "openvino", "sentence-transformers"]
WORDS = """
passage query vector 向量 检索 the of and to in that is for as with retrieval embedding token
weights 文本 意思 相近 rights freedom life liberty dignity person brotherhood equal reason act
search nearest answer model score dense lexical 查询 文档 人人 自由 平等 language document page
"""
VOCABULARY = WORDS.split()


def machine() -> str:
    """The processor, its memory and the libraries that matter, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    units = instructions()
    libraries = ", ".join(f"{name} {installed(name)}" for name in LIBRARIES if installed(name))
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {model} ({units}), {memory:.0f} GiB; {python}, {libraries}"


def instructions() -> str:
    """The widest matrix instructions of this CPU that PyTorch may use."""
    import torch

    found = torch.cpu.get_capabilities()
    names = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX-512 BF16",
        "avx512_vnni": "AVX-512 VNNI",
        "avx2": "AVX2",
        "bf16": "Arm BF16",
    }
    units = [name for key, name in names.items() if found.get(key)]
    return ", ".join(units) or platform.machine()


def installed(name: str) -> str:
    """A library's version, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def text_of(tokens: int, count: Callable[[str], int], chooser: random.Random) -> str:
    """Random words that come to so many tokens, special ones left out."""
    words: list[str] = []
    while count(" ".join(words)) < tokens:
        words += chooser.choices(VOCABULARY, k=max(1, (tokens - len(words)) // 4))
    while len(words) > 1 and count(" ".join(words)) > tokens:
        words.pop()
    return " ".join(words)


def mixed_lengths(total: int, chooser: random.Random) -> list[int]:
    """Log-normal lengths from 16 to 512 tokens that sum up to at least `total`."""
    lengths: list[int] = []
    while sum(lengths) < total:
        length = round(chooser.lognormvariate(4.3, 0.9))
        if 16 <= length <= 512:
            lengths.append(length)
    return lengths


def median_seconds(function: Callable[[], object], times: int) -> float:
    """Median wall time of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak() -> None:
    """Have `peak_memory` start anew, where the system can."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def resident_memory() -> float:
    """Resident size of this process now, in GiB; where the system does not tell, the largest."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the others lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def finish(name: str, results: object) -> None:
    """Print everything as one line of JSON, the last line of every benchmark."""
    print(json.dumps({"benchmark": name, "machine": machine(), "results": results}))
