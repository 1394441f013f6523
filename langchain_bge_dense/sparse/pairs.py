"""The dense and the sparse side of a hybrid store, from one forward pass."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from langchain_bge_dense._engine.calls import checked_texts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from langchain_bge_dense._engine.calls import BaseEngine, Options
    from langchain_bge_dense._engine.encoding import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings

    Key = tuple[Options, tuple[str, ...]]

_MOST = 8  # encodings whose other half was not asked for yet


class Pairs:
    """Encodings for the second of two calls with the same texts.

    A hybrid store asks its dense and its sparse embeddings for the same texts one after the other.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, tuple[str, M3Encoding]] = OrderedDict()

    def encode(
        self,
        engine: BaseEngine,
        texts: Iterable[str],
        options: Options,
        side: str = "dense",
        **progress: bool,
    ) -> M3Encoding:
        """Encode texts for one side, or take the encoding that the other side left."""
        key = _key(texts, options)
        if (kept := self._take(key, side)) is not None:
            return kept
        lexical = side == "lexical" or engine.checkpoint.has_heads
        return self._keep(
            key, side, engine.encode(list(key[1]), options, lexical=lexical, **progress)
        )

    async def aencode(
        self, engine: BaseEngine, texts: Iterable[str], options: Options
    ) -> M3Encoding:
        """`encode` for the dense side in an event loop."""
        key = _key(texts, options)
        if (kept := self._take(key, "dense")) is not None:
            return kept
        lexical = engine.checkpoint.has_heads
        return self._keep(
            key, "dense", await engine.aencode(list(key[1]), options, lexical=lexical)
        )

    def _take(self, key: Key, side: str) -> M3Encoding | None:
        """Take the encoding that the other side left."""
        kept_for, encoding = self._kept.pop(key, (side, None))
        return None if kept_for == side else encoding

    def _keep(self, key: Key, side: str, encoding: M3Encoding) -> M3Encoding:
        """Leave an encoding to the other side."""
        self._kept[key] = (side, encoding)
        while len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return encoding


def _key(texts: Iterable[str], options: Options) -> Key:
    return options._replace(urgent=False), tuple(checked_texts(texts))


def lexical(
    embeddings: BGEM3Embeddings, texts: Iterable[str], *, query: bool
) -> list[dict[int, float]]:
    """Compute lexical weights, and leave the dense vectors of the same pass to the dense side."""
    session, pairs = embeddings.session(), embeddings.pair(Pairs)
    options = session.queries if query else session.documents
    return pairs.encode(embeddings.engine(), texts, options, "lexical").lexical or []
