"""BGE-M3's lexical weights as langchain-milvus's sparse embeddings."""

from __future__ import annotations

from langchain_milvus.utils.sparse import BaseSparseEmbedding

from langchain_bge_dense._memo import LexicalSide


class BGEM3MilvusSparse(LexicalSide, BaseSparseEmbedding):
    """Lexical weights of BGE-M3 for `Milvus`.

    Args:
        embeddings: The model; pass the same object as the store's dense embeddings, so that texts
            are encoded once for both.
    """

    def embed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        """Lexical weights of N passages; an empty text has none.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return self._documents(texts)

    def embed_query(self, query: str) -> dict[int, float]:
        """Lexical weights of a query.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return self._query(query)
