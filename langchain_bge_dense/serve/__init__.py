"""One loaded model for many processes, over HTTP: on one machine, or by Ray Serve on many.

`python -m langchain_bge_dense.serve` starts a server; `BGEM3Embeddings(base_url=...)` and clients
of OpenAI, Cohere, Jina, Ollama and text-embeddings-inference talk to it. All callers share its
batches. Needs the extra `serve`.

On many machines and GPUs Ray Serve runs the same application, with the extra `ray`:

    from ray import serve

    embeddings = BGEM3Embeddings(device="cuda")
    gpu = {"num_replicas": 4, "ray_actor_options": {"num_gpus": 1}}
    serve.start(http_options={"host": "0.0.0.0", "port": 8000})
    serve.run(serve_deployment(embeddings, api_key=key, **gpu))

Every node answers `BGEM3Embeddings(base_url="http://node:8000", api_key=key)`. Ray starts a replica
that died anew, and clients ask another one what it has not answered.
"""

from langchain_bge_dense._extras import needs

with needs("serve", __name__):
    from langchain_bge_dense.serve.app import create_app, serve_deployment
    from langchain_bge_dense.serve.command import main

__all__ = ["create_app", "main", "serve_deployment"]
