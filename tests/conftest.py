"""Session fixtures: two checkpoints, and the embeddings that read them.

The random one (`tiny_checkpoint`) is for whether numbers are right, the small real one
(`small_checkpoint`) for whether they mean anything.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from small_model import build, default_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_bge_dense import BGEM3Embeddings

_SMALL_FOLDER = default_folder()

# Loads go through BGEM3FlagModel, and none leaves a file in the user's cache.
os.environ["LANGCHAIN_BGE_DENSE_CACHE"] = "0"

settings.register_profile("tests", deadline=None)  # the machine may be busy
settings.load_profile("tests")

# A shell that runs the tests in the background makes them, and what they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_m3 import build as build_tiny

    return build_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def small_checkpoint() -> Path:
    return build(_SMALL_FOLDER)


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Iterator[BGEM3Embeddings]:
    yield from _embeddings(tiny_checkpoint)


@pytest.fixture(scope="session")
def prompted(small_checkpoint: Path) -> Iterator[BGEM3Embeddings]:
    """The small model as its users have it, with the prompts of its checkpoint."""
    yield from _embeddings(small_checkpoint)


@pytest.fixture(scope="session")
def small(prompted: BGEM3Embeddings) -> BGEM3Embeddings:
    """The small model without prompts: a text has one vector, as a query and as a document."""
    return prompted.model_copy(update={"query_instruction": "", "document_instruction": ""})


def _embeddings(folder: Path) -> Iterator[BGEM3Embeddings]:
    from langchain_bge_dense import BGEM3Embeddings

    embeddings = BGEM3Embeddings(model=str(folder), device="cpu", dtype="float32")
    yield embeddings
    embeddings.close()
