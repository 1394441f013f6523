"""Chroma collections that are right from the start, and stay right.

`open_chroma` gives a LangChain `Chroma` in cosine space that knows which model its vectors are of;
`index_documents` fills it from any iterable. Any `Embeddings` will do.

For a bulk load, and for documents that only ever grow in number, use `index_documents`. For a
folder whose files change and go, use LangChain's `index()` with a record manager: it deletes what
has left the folder. It gives documents ids of its own: one collection is filled by one of the two,
as the same document would be stored once by each.
"""

from langchain_bge_dense._extras import needs

with needs("chroma", __name__):
    from langchain_bge_dense.chroma.adopt import adopt
    from langchain_bge_dense.chroma.compaction import CompactResult, compact
    from langchain_bge_dense.chroma.indexing import (
        IndexResult,
        aindex_documents,
        index_documents,
        index_vectors,
    )
    from langchain_bge_dense.chroma.store import BGEM3Chroma, open_chroma

__all__ = [
    "BGEM3Chroma",
    "CompactResult",
    "IndexResult",
    "adopt",
    "aindex_documents",
    "compact",
    "index_documents",
    "index_vectors",
    "open_chroma",
]
