"""Each part without its extra: an error that says how to install it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVED = "langchain_bge_dense.serve"
PARTS = [
    ("import langchain_bge_dense.chroma", "chromadb", "langchain_bge_dense.chroma", "chroma"),
    ("import langchain_bge_dense.chroma", "scipy", "langchain_bge_dense.chroma", "chroma"),
    ("import langchain_bge_dense.ray", "ray", "langchain_bge_dense.ray", "ray"),
    ("import langchain_bge_dense.ray", "pyarrow", "langchain_bge_dense.ray", "ray"),
    (f"import {SERVED}", "uvicorn", SERVED, "serve"),
    (f"from {SERVED} import serve_deployment as d; d(0)", "ray", "serve_deployment", "ray"),
    ("from langchain_bge_dense.sparse import *", "langchain_milvus", "BGEM3MilvusSparse", "milvus"),
    (
        "from langchain_bge_dense.sparse import BGEM3QdrantSparse",
        "langchain_qdrant",
        "BGEM3QdrantSparse",
        "qdrant",
    ),
]


def run(code: str) -> str:
    """Standard error of a process that fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("code", "missing", "part", "extra"), PARTS)
def test_a_missing_extra_is_named(code: str, missing: str, part: str, extra: str) -> None:
    told = run(f"import sys; sys.modules[{missing!r}] = None; {code}")
    assert told.startswith(f"ModuleNotFoundError: {part} needs {missing}")
    assert told.endswith(
        f'is not installed. In a clone of langchain-bge-dense run: pip install ".[{extra}]"'
    )
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8")


def test_a_part_of_ours_that_is_missing_needs_no_extra() -> None:
    name = "langchain_bge_dense.chroma.store"
    told = run(f"import sys; sys.modules[{name!r}] = None; import langchain_bge_dense.chroma")
    assert told.startswith("ModuleNotFoundError: import of langchain_bge_dense.chroma.store")
