"""BGE-M3's lexical weights as the sparse embeddings of Qdrant and of Milvus.

`BGEM3QdrantSparse` needs the extra `qdrant`, `BGEM3MilvusSparse` the extra `milvus`; each is
imported when it is first asked for. One `BGEM3Embeddings` serves as both the dense and the sparse
side of a store, and texts that both ask for are encoded once.

ColBERT vectors do not go into a `QdrantVectorStore`: that of langchain-qdrant 1.1 writes one dense
vector a passage, and none of Qdrant's multivectors. `BGEM3Reranker` computes them for the documents
that a store has found.

Example:
    >>> from langchain_bge_dense import BGEM3Embeddings
    >>> from langchain_bge_dense.sparse import BGEM3QdrantSparse
    >>> from langchain_qdrant import QdrantVectorStore, RetrievalMode
    >>> embeddings = BGEM3Embeddings(model=checkpoint)
    >>> store = QdrantVectorStore.from_texts(
    ...     ["equal rights", "a brown fox"],
    ...     embeddings,
    ...     sparse_embedding=BGEM3QdrantSparse(embeddings),
    ...     retrieval_mode=RetrievalMode.HYBRID,
    ...     location=":memory:",
    ... )
    >>> store.similarity_search("equal rights", k=1)[0].page_content
    'equal rights'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_bge_dense._extras import needs

if TYPE_CHECKING:
    from langchain_bge_dense.sparse.milvus import BGEM3MilvusSparse
    from langchain_bge_dense.sparse.qdrant import BGEM3QdrantSparse

__all__ = ["BGEM3MilvusSparse", "BGEM3QdrantSparse"]

_EXTRAS = {"BGEM3MilvusSparse": "milvus", "BGEM3QdrantSparse": "qdrant"}


def __getattr__(name: str) -> Any:
    if name not in _EXTRAS:
        msg = f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}."
        raise AttributeError(msg)
    extra = _EXTRAS[name]
    with needs(extra, name):
        return getattr(import_module(f"{__name__}.{extra}"), name)
