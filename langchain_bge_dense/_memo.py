"""Encodings kept for the second of two calls with the same texts.

A hybrid vector store asks dense and sparse embeddings for the same texts one after the other; both
come from one forward pass. Knows no store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from langchain_bge_dense._texts import checked

if TYPE_CHECKING:
    from langchain_bge_dense._encoding import M3Encoding
    from langchain_bge_dense.embeddings import BGEM3Embeddings

_KEPT = 8  # batches whose other half has not been asked for yet


class Memo:
    """Dense and lexical outputs, each taken once by either side."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, tuple[str, ...]], tuple[str, M3Encoding]] = OrderedDict()
        self._lock = threading.Lock()

    def take(
        self, side: str, texts: list[str], instruction: str, embeddings: BGEM3Embeddings
    ) -> M3Encoding:
        """The encoding that the other side left, or a new one that is left to it.

        Args:
            side: Who asks, `"dense"` or `"sparse"`.
            texts: What is to be encoded.
            instruction: What is put in front of it.
            embeddings: What encodes.
        """
        key = (instruction, tuple(texts))
        with self._lock:
            left_by, encoding = self._kept.pop(key, (side, None))
        if encoding is not None and left_by != side:
            return encoding
        encoding = embeddings.encode(texts, lexical=True, instruction=instruction)
        with self._lock:
            self._kept[key] = (side, encoding)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return encoding


class LexicalSide:
    """What the sparse embeddings of every store share.

    Args:
        embeddings: The model; the same object as the store's dense embeddings.
    """

    def __init__(self, embeddings: BGEM3Embeddings) -> None:
        self._embeddings = embeddings
        self._memo = embeddings._shared_memo()  # noqa: SLF001 - one memo for both sides

    def _documents(self, texts: list[str]) -> list[dict[int, float]]:
        return self._weights(checked(texts), self._embeddings.document_instruction)

    def _query(self, text: str) -> dict[int, float]:
        return self._weights(checked([text]), self._embeddings.query_instruction)[0]

    def _weights(self, texts: list[str], instruction: str) -> list[dict[int, float]]:
        encoding = self._memo.take("sparse", texts, instruction, self._embeddings)
        return encoding.lexical or []
