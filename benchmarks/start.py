"""What an import costs beside LangChain's own base class, and a load, the first one and again.

    python benchmarks/start.py
    python benchmarks/start.py --model CHECKPOINT --dtype int8

Each runs in a process of its own, several times in turn; the fastest counts. A first load writes
the file that later ones map, in a cache of its own. Memory is at its peak, and what stays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from common import finish, machine, show

LIBRARIES = "import torch; from transformers import AutoModel, AutoTokenizer"
OURS = "from langchain_bge_dense._engine.flag import flag_model_class; flag_model_class()"
IMPORTS = {
    "langchain_core.embeddings": "import langchain_core.embeddings",
    "langchain_bge_dense": "import langchain_bge_dense",
    "Embeddings of langchain_core": "from langchain_core.embeddings import Embeddings",
    "BGEM3Embeddings": "from langchain_bge_dense import BGEM3Embeddings",
    "torch and transformers": LIBRARIES,
    "the same and BGEM3FlagModel, as a load imports it": f"{LIBRARIES}; {OURS}",
    "the same and FlagEmbedding": f"{LIBRARIES}; import FlagEmbedding",
}
LOAD = """
import json, resource, time
start = time.perf_counter()
from langchain_bge_dense import BGEM3Embeddings
embeddings = BGEM3Embeddings(model={model!r}, dtype={dtype!r}, device="cpu").load()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
with open("/proc/self/statm") as stream:
    stays = int(stream.read().split()[1]) * resource.getpagesize() / 2**30
print(json.dumps([seconds, peak, stays]))
"""
TIMER = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"
ROUNDS = 7
LOADS = 3


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMER.format(statement)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def load(model: str, dtype: str, cache: str) -> list[float]:
    """Seconds, GiB at the peak and GiB that stay."""
    code = LOAD.format(model=model, dtype=dtype)
    environment = os.environ | {"LANGCHAIN_BGE_DENSE_CACHE": cache}
    ended = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, env=environment
    )
    found: list[float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def loads(model: str, dtype: str) -> dict[str, list[float]]:
    """The fastest load without a file, the first that writes it, and the fastest with it."""
    with TemporaryDirectory() as cache:
        return {
            "without": min(load(model, dtype, "0") for _ in range(LOADS)),
            "first": load(model, dtype, cache),
            "again": min(load(model, dtype, cache) for _ in range(LOADS)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="time loads of this checkpoint instead")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    print(machine() + "\n")
    if arguments.model:
        found = loads(arguments.model, arguments.dtype)
        rows = [
            [name, f"{s:.1f} s", *map("{:.2f} GiB".format, gib)]
            for name, (s, *gib) in found.items()
        ]
        show(["load", "time", "peak", "stays"], rows)
        finish("start", found)
        return
    runs = [{name: seconds(code) for name, code in IMPORTS.items()} for _ in range(ROUNDS)]
    fastest = {name: min(run[name] for run in runs) for name in IMPORTS}
    show(["import", "time"], [[name, f"{time:.3f} s"] for name, time in fastest.items()])
    finish("start", fastest)


if __name__ == "__main__":
    main()
