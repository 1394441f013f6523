"""BGE-M3's lexical weights as langchain-milvus's sparse embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_milvus.utils.sparse import BaseSparseEmbedding

from langchain_bge_dense.sparse.pairs import Pairs, lexical

if TYPE_CHECKING:
    from langchain_bge_dense.embeddings import BGEM3Embeddings


# Milvus refuses a batch with an empty row, such as that of a single emoji. No token has this id.
_UNFOUND = {2**31 - 1: 1e-6}


class BGEM3MilvusSparse(BaseSparseEmbedding):
    """Lexical weights of BGE-M3 for `Milvus`.

    Args:
        embeddings: The model; pass the same object as the store's dense embeddings, so that texts
            are encoded once for both.
    """

    def __init__(self, embeddings: BGEM3Embeddings) -> None:
        self._embeddings = embeddings
        embeddings.pair(Pairs)

    def embed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        """Compute lexical weights of N passages. A text without any gets one that no query finds.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return [
            weights or dict(_UNFOUND) for weights in lexical(self._embeddings, texts, query=False)
        ]

    def embed_query(self, query: str) -> dict[int, float]:
        """Compute the lexical weights of a query.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return lexical(self._embeddings, [query], query=True)[0]
