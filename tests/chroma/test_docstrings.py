"""The examples in docstrings of the package of Chroma, with what it exports at hand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import langchain_bge_dense
from langchain_bge_dense import chroma

MODULES = [module.name for module in pkgutil.iter_modules(chroma.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"langchain_bge_dense.chroma.{name}")
    exported = {each: getattr(chroma, each) for each in chroma.__all__}
    given = {"BGEM3Embeddings": langchain_bge_dense.BGEM3Embeddings, **exported}
    done = doctest.testmod(module, extraglobs={**given, "checkpoint": str(tiny_checkpoint)})
    assert done.failed == 0
