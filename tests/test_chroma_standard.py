"""langchain-tests on a store of `open_chroma`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from langchain_bge_dense.chroma import open_chroma

if TYPE_CHECKING:
    from langchain_core.vectorstores import VectorStore


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return open_chroma(self.get_embeddings())
