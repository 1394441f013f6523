"""Where the data of a store is: in a folder, with a client, on a server, or in memory.

Knows no embeddings and no documents.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from chromadb.config import Settings

from langchain_bge_dense._collection import local_client

if TYPE_CHECKING:
    from chromadb.api import ClientAPI


def check_place(**options: Any) -> None:
    """Refuse more than one place.

    Raises:
        ValueError: Two are given.
    """
    places = ("persist_directory", "client", "host", "chroma_cloud_api_key")
    given = [name for name in places if options.get(name) is not None]
    if len(given) > 1:
        msg = f"{' and '.join(given)} are given, and data has one place. Pass one of them."
        raise ValueError(msg)


def placed(
    folder: str | os.PathLike[str] | None, client: ClientAPI | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options with a client, or with what Chroma makes one of."""
    if client is not None:
        return {**options, "client": client}
    if options.get("client_settings") is not None:
        return {**options, "persist_directory": folder and os.fspath(folder)}
    if {"host", "chroma_cloud_api_key"} & options.keys():
        return {**options, "client_settings": Settings(anonymized_telemetry=False)}
    names = {key: options.pop(key) for key in ("tenant", "database") if options.get(key)}
    return {**options, "client": local_client(folder, **names)}
