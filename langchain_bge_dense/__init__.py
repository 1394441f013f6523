"""BGE-M3 embeddings for LangChain: dense, lexical and ColBERT vectors of one forward pass.

Importing the package imports neither torch nor FlagEmbedding: names are fetched when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings
    from langchain_bge_dense.rerank import BGEM3Reranker
    from langchain_bge_dense.retriever import BGEM3Retriever

    __version__: str

_HOMES = {
    "BGEM3Embeddings": "embeddings",
    "BGEM3Reranker": "rerank",
    "BGEM3Retriever": "retriever",
    "M3Encoding": "_engine.encoding",
}

__all__ = ["BGEM3Embeddings", "BGEM3Reranker", "BGEM3Retriever", "M3Encoding", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("langchain-bge-dense")
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}. It has {', '.join(__all__)}."
        raise AttributeError(msg)
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
