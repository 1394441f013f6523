"""BGE-M3's lexical weights as langchain-qdrant's sparse embeddings."""

from __future__ import annotations

from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector

from langchain_bge_dense._memo import LexicalSide


class BGEM3QdrantSparse(LexicalSide, SparseEmbeddings):
    """Lexical weights of BGE-M3 for `QdrantVectorStore`.

    Args:
        embeddings: The model; pass the same object as the store's dense embeddings, so that texts
            are encoded once for both.
    """

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Lexical weights of N passages; an empty text has none.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return [_vector(weights) for weights in self._documents(texts)]

    def embed_query(self, text: str) -> SparseVector:
        """Lexical weights of a query.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return _vector(self._query(text))


def _vector(weights: dict[int, float]) -> SparseVector:
    return SparseVector(indices=list(weights), values=list(weights.values()))
