"""One loaded model for many processes, over HTTP: on one machine, or by Ray Serve on many.

`python -m langchain_bge_dense.serve` starts a server; `BGEM3Embeddings(base_url=...)` and clients
of OpenAI's API talk to it. All callers share its batches. Needs the extra `serve`.
"""

try:
    from langchain_bge_dense.serve.app import create_app
    from langchain_bge_dense.serve.command import main
    from langchain_bge_dense.serve.deployment import serve_deployment
except ImportError as error:
    msg = (
        f"langchain_bge_dense.serve needs {error.name}, which is not installed. "
        'Install it with: pip install "langchain-bge-dense[serve]"'
    )
    raise ImportError(msg, name=error.name) from error

__all__ = ["create_app", "main", "serve_deployment"]
