"""What the package exports, what importing it costs, and whether its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from reference import flag_model

import langchain_bge_dense

if TYPE_CHECKING:
    from pathlib import Path

EXPORTS = ["BGEM3Embeddings", "BGEM3Reranker", "BGEM3Retriever", "M3Encoding", "__version__"]
MODULES = [module.name for module in pkgutil.iter_modules(langchain_bge_dense.__path__)]
RUN_EXAMPLES = """
import doctest, sys
import langchain_bge_dense.ray as module
failed = doctest.testmod(module, extraglobs={"checkpoint": sys.argv[1]}).failed
module.ray.shutdown()
sys.exit(failed)
"""


def test_the_exported_names() -> None:
    assert sorted(langchain_bge_dense.__all__) == EXPORTS
    assert dir(langchain_bge_dense) == EXPORTS
    assert all(getattr(langchain_bge_dense, name) for name in EXPORTS)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'BGEM4Embeddings'.*BGEM3Embeddings"):
        _ = langchain_bge_dense.BGEM4Embeddings


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys; from langchain_bge_dense import BGEM3Embeddings; BGEM3Embeddings();"
        "print(*sorted({'torch', 'FlagEmbedding', 'transformers', 'huggingface_hub', 'numpy',"
        " 'tqdm', 'chromadb'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", sorted({*MODULES} - {"ray"}))
def test_the_examples_in_docstrings_run(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"langchain_bge_dense.{name}")
    given = {
        "BGEM3Embeddings": langchain_bge_dense.BGEM3Embeddings,
        "checkpoint": str(tiny_checkpoint),
        "flag": flag_model(tiny_checkpoint),
    }
    assert doctest.testmod(module, extraglobs=given).failed == 0


def test_the_examples_of_ray_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray leaves its log open, which would fail a test that runs later."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", RUN_EXAMPLES, str(tiny_checkpoint)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_method_has_an_example_or_names_its_twin() -> None:
    methods = inspect.getmembers(
        langchain_bge_dense.BGEM3Embeddings,
        lambda member: inspect.isfunction(member) or isinstance(member, property),
    )
    ours = {
        name: inspect.getdoc(member)
        for name, member in methods
        if not name.startswith("_")
        and getattr(getattr(member, "fget", member), "__module__", "").startswith("langchain_bge")
    }
    assert {"embed_documents", "encode", "embed_stream", "dimension"} <= ours.keys()
    assert [name for name, text in ours.items() if not text] == []
    assert "`embed_query` for an event loop" in ours["aembed_query"]
