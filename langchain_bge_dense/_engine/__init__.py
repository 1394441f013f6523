"""From texts to `M3Encoding`: files, model, batches and threads, without LangChain."""
