"""BGE-M3 embeddings for LangChain."""
