"""The few looks of tests into what a store keeps to itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_bge_dense.chroma.signals import Encoded, key_of, pack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb.api.models.Collection import Collection

    from langchain_bge_dense.chroma import BGEM3Chroma
    from langchain_bge_dense.chroma.lexical import LexicalIndex
    from langchain_bge_dense.chroma.settings import CollectionSettings


def plain(store: BGEM3Chroma) -> Collection:
    """Chroma's own collection, which nothing guards."""
    return store.passages.collection.open()


def settings_of(store: BGEM3Chroma) -> CollectionSettings:
    """Settings as the collection's metadata have them."""
    return store.passages.refresh()


def collections(store: BGEM3Chroma) -> list[str]:
    """Names of all collections of the store's database."""
    return sorted(each.name for each in store.passages.session.client.list_collections())


def index_of(store: BGEM3Chroma) -> LexicalIndex:
    """The index of lexical weights, read to its end."""
    index = store.passages.index
    index.sync()
    return index


def keep(store: BGEM3Chroma, keys: Sequence[str], **columns: Any) -> None:
    """Write signals of passages: `lexical` as dicts, `codes` as bytes."""
    if "lexical" in columns:
        columns["lexical"] = list(map(pack, columns["lexical"]))
    store.passages.acquire_writer()
    store.passages.signals.put(keys, Encoded(np.empty((len(keys), 0), np.float32), **columns))


def coded(store: BGEM3Chroma, texts: Mapping[str, str]) -> set[str]:
    """Ids of those texts by id that have ColBERT codes."""
    keys = {key_of(passage, text): passage for passage, text in texts.items()}
    kept = store.passages.signals.available(list(keys))
    return {keys[key] for key, has in kept.items() if has.codes}
