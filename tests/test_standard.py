"""LangChain's own tests for embeddings, on the tiny checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from pathlib import Path


class _OnTheTinyCheckpoint:
    _folder: str

    @pytest.fixture(autouse=True)
    def _checkpoint(self, tiny_checkpoint: Path) -> None:
        type(self)._folder = str(tiny_checkpoint)

    @property
    def embeddings_class(self) -> type[BGEM3Embeddings]:
        return BGEM3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, str]:
        return {"model": self._folder, "device": "cpu"}


class TestUnit(_OnTheTinyCheckpoint, EmbeddingsUnitTests):
    pass


class TestIntegration(_OnTheTinyCheckpoint, EmbeddingsIntegrationTests):
    pass
