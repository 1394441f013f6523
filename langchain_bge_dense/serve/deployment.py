"""`serve_deployment`: the application as a deployment of Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_bge_dense._extras import needs
from langchain_bge_dense.serve.app import QUEUE, create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from langchain_bge_dense.embeddings import BGEM3Embeddings

_APP_OPTIONS = ("api_key", "max_texts", "max_body", "max_queue")


def serve_deployment(embeddings: BGEM3Embeddings, **options: Any) -> Any:
    """The same application as a deployment of Ray Serve, for many machines and GPUs.

    Needs the extra `ray`, too. Each replica loads the model from the settings of `embeddings`.

    Args:
        embeddings: The settings of the model.
        options: Those of `create_app`; all others are for `ray.serve.deployment`, such as
            `num_replicas`, `autoscaling_config` and `ray_actor_options={"num_gpus": 1}`.

    Returns:
        What `ray.serve.run` takes.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> served = serve_deployment(BGEM3Embeddings(model=checkpoint), num_replicas=2)
    """
    with needs("ray", "serve_deployment"):
        from ray import serve

    ours = {name: options.pop(name) for name in _APP_OPTIONS if name in options}

    def build() -> FastAPI:
        return create_app(embeddings.load(), **ours)

    options.setdefault("max_ongoing_requests", ours.get("max_queue", QUEUE))
    return serve.deployment(**options)(serve.ingress(build)()).bind()
