"""`BGEM3Embeddings`, the LangChain face: text in, vectors out. No torch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

from langchain_bge_dense._calls import Call, progress_bar
from langchain_bge_dense._settings import ModelSettings
from langchain_bge_dense._texts import checked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense._encoding import M3Encoding


class BGEM3Embeddings(ModelSettings, Embeddings):
    """BGE-M3 embeddings, computed on this machine by FlagEmbedding's `BGEM3FlagModel`.

    The model is loaded with the first text. Instances with equal model settings share it, and all
    methods may be called from any thread or event loop.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> embeddings = BGEM3Embeddings(model=checkpoint)
        >>> vector = embeddings.embed_query("what is a dense vector?")
        >>> len(vector) == embeddings.dimension
        True
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed passages.

        Args:
            texts: N passages.

        Returns:
            N dense vectors of Python floats.

        Raises:
            TypeError: An item is not a string; the error names its index.
            ValueError: A text cannot be encoded, or is too long with `on_truncate="raise"`.
            FloatingPointError: A vector is not finite in float32 either.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> vectors = embeddings.embed_documents(["a passage", "another"])
            >>> len(vectors)
            2
        """
        if not texts:
            return []
        if self._memo is None:
            encoding = self.encode(texts)
        else:
            encoding = self._memo.take("dense", checked(texts), self.document_instruction, self)
        return encoding.dense.tolist()  # type: ignore[union-attr, no-any-return]

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, ahead of documents that wait.

        Args:
            text: The query.

        Returns:
            Its dense vector of Python floats.

        Raises:
            TypeError: `text` is not a string.
            ValueError: It cannot be encoded, or is too long with `on_truncate="raise"`.
            FloatingPointError: The vector is not finite in float32 either.

        Example:
            >>> vector = BGEM3Embeddings(model=checkpoint).embed_query("what is a vector?")
        """
        if self._memo is not None:
            encoding = self._memo.take("dense", checked([text]), self.query_instruction, self)
            return encoding.dense[0].tolist()  # type: ignore[index, no-any-return]
        call = self._call(self.query_instruction, urgent=True)
        [part] = call.run([text])
        return call.floats(part)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents` for an event loop; cancelling it drops the texts that have not run."""
        texts = checked(texts)
        await self._aload()
        call = self._call(self.document_instruction)
        vectors: list[list[float]] = []
        async for part in call.arun(texts):
            vectors += call.floats(part, first=len(vectors))
        return vectors

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query` for an event loop; cancelling it drops the query."""
        await self._aload()
        call = self._call(self.query_instruction, urgent=True)
        [part] = [part async for part in call.arun([text])]
        return call.floats(part)[0]

    def embed_stream(self, texts: Iterable[str]) -> Iterator[NDArray[np.float32]]:
        """Embed passages from any iterable, in constant memory.

        Args:
            texts: Passages; up to two windows of 2,048 are read ahead of what is taken.

        Returns:
            An iterator of dense vectors, each `(D,)` float32, in the order of the passages.

        Raises:
            TypeError: An item is not a string; vectors of earlier windows have come by then.
            ValueError: A text cannot be encoded, or is too long with `on_truncate="raise"`.
            FloatingPointError: A vector is not finite in float32 either.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> stream = embeddings.embed_stream(f"line {i}" for i in range(3))
            >>> [vector.dtype.name for vector in stream]
            ['float32', 'float32', 'float32']
        """
        if isinstance(texts, (str, bytes)):
            checked(texts)
        call = self._call(self.document_instruction)
        return call.stream(texts)

    def encode(
        self,
        texts: Iterable[str],
        *,
        dense: bool = True,
        lexical: bool = False,
        colbert: bool = False,
        instruction: str | None = None,
    ) -> M3Encoding:
        """Compute any of BGE-M3's three outputs in one forward pass.

        Args:
            texts: N texts.
            dense: Compute dense vectors, `(N, D)` float32.
            lexical: Compute lexical weights, N dicts of token id to weight.
            colbert: Compute ColBERT vectors, N arrays `(T_i, D)` float32.
            instruction: Put in front of each text; None: `document_instruction`.

        Returns:
            The outputs that were asked for, with token counts and what was truncated.

        Raises:
            TypeError: An item is not a string; the error names its index.
            ValueError: No output is asked for, the checkpoint has no heads for it, a text cannot be
                encoded, or is too long with `on_truncate="raise"`.
            FloatingPointError: An output is not finite in float32 either.

        Example:
            >>> encoding = BGEM3Embeddings(model=checkpoint).encode(["a passage"], lexical=True)
            >>> encoding.dense.shape[0], len(encoding.lexical)
            (1, 1)
        """
        texts = checked(texts)
        call = self._call(
            self.document_instruction if instruction is None else instruction,
            dense=dense,
            lexical=lexical,
            colbert=colbert,
            urgent=len(texts) == 1,
        )
        with progress_bar(len(texts), show=self.show_progress) as bar:
            parts = list(call.run(texts, bar))
        return call.encoding(parts)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without the special ones around it: a splitter's `length_function`.

        Example:
            >>> BGEM3Embeddings(model=checkpoint).count_tokens("")
            0
        """
        return self._loaded().encoder.count(*checked([text]))

    def tokens(self, weights: dict[int, float]) -> dict[str, float]:
        """Lexical weights with token strings for keys, the largest first, for people to read.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> [weights] = embeddings.encode(["vector"], lexical=True).lexical
            >>> len(embeddings.tokens(weights)) == len(weights)
            True
        """
        return self._loaded().encoder.named(weights)

    async def _aload(self) -> None:
        if self._engine is None:
            await asyncio.to_thread(self._loaded)

    def _call(self, instruction: str, *, urgent: bool = False, **signals: bool) -> Call:
        engine = self._loaded()
        return Call(
            engine=engine,
            signals=engine.signals(**signals),
            instruction=instruction,
            max_length=self._longest(),
            batch_tokens=self.batch_tokens or engine.encoder.batch_tokens,
            normalize=self.normalize,
            on_truncate=self.on_truncate,
            urgent=urgent,
        )
