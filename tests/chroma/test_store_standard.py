"""langchain-tests on a store of `open_chroma`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from langchain_bge_dense.chroma import open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_core.vectorstores import VectorStore

    from langchain_bge_dense import BGEM3Embeddings


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return open_chroma(self.get_embeddings())


class TestHybridStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tiny: BGEM3Embeddings, tmp_path: Path) -> Iterator[VectorStore]:
        with open_chroma(tiny, persist_directory=tmp_path, lexical=True) as store:
            yield store
