"""What importing the package costs beside LangChain's own base class, and the model's class.

    python benchmarks/start.py

Each import runs in a process of its own, several times in turn; the fastest counts.
"""

from __future__ import annotations

import subprocess
import sys

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
TIMER = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"
ROUNDS = 7


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMER.format(statement)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    print(machine() + "\n")
    runs = [{name: seconds(code) for name, code in IMPORTS.items()} for _ in range(ROUNDS)]
    fastest = {name: min(run[name] for run in runs) for name in IMPORTS}
    show(["import", "time"], [[name, f"{time:.3f} s"] for name, time in fastest.items()])
    finish("start", fastest)


if __name__ == "__main__":
    main()
