"""A server of the tiny checkpoint for the tests of its paths, and an HTTP client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from calls import WAIT
from model_server import served
from tiny_m3 import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_bge_dense import BGEM3Embeddings


@pytest.fixture(scope="module")
def url(tiny: BGEM3Embeddings) -> Iterator[str]:
    with served(tiny) as url:
        yield url


@pytest.fixture(scope="session")
def dense_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("checkpoints") / "dense-only", with_heads=False)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=WAIT) as http:
        yield http
