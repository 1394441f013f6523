"""BGE-M3's lexical weights as langchain-qdrant's sparse embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector

from langchain_bge_dense.sparse.pairs import Pairs, lexical

if TYPE_CHECKING:
    from langchain_bge_dense.embeddings import BGEM3Embeddings


class BGEM3QdrantSparse(SparseEmbeddings):
    """Lexical weights of BGE-M3 for `QdrantVectorStore`.

    Args:
        embeddings: The model; pass the same object as the store's dense embeddings, so that texts
            are encoded once for both.
    """

    def __init__(self, embeddings: BGEM3Embeddings) -> None:
        self._embeddings = embeddings
        embeddings.pair(Pairs)

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Compute lexical weights of N passages. An empty text has none.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return [_vector(weights) for weights in lexical(self._embeddings, texts, query=False)]

    def embed_query(self, text: str) -> SparseVector:
        """Compute the lexical weights of a query.

        Raises:
            ValueError: The checkpoint is dense only.
        """
        return _vector(lexical(self._embeddings, [text], query=True)[0])


def _vector(weights: dict[int, float]) -> SparseVector:
    return SparseVector(indices=list(weights), values=list(weights.values()))
