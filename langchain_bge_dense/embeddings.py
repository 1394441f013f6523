"""`BGEM3Embeddings`: LangChain's `Embeddings` over an engine in this process or on a server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from langchain_core.embeddings import Embeddings
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)

from langchain_bge_dense._engine.checkpoint import Checkpoint, read_checkpoint
from langchain_bge_dense._engine.hub import HubSource, resolve
from langchain_bge_dense._keywords import check_keywords

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from FlagEmbedding import BGEM3FlagModel
    from numpy.typing import NDArray
    from typing_extensions import Self

    from langchain_bge_dense._engine.calls import BaseEngine, Options
    from langchain_bge_dense._engine.encoding import M3Encoding

P = TypeVar("P")

# Fields of a model that is loaded here.
_OF_THE_MODEL = (
    "model",
    "revision",
    "token",
    "cache_folder",
    "local_files_only",
    "device",
    "dtype",
    "pooling",
    "batch_tokens",
)
_OF_A_CLIENT = ("api_key",)
_UNLOADED = {"_session": None, "_engine": None, "_pairs": None}


class Session(NamedTuple):
    """Checkpoint and options of some embeddings, for the other parts of this package."""

    checkpoint: Checkpoint
    documents: Options
    """How `embed_documents` encodes."""
    queries: Options
    """How `embed_query` does."""


class BGEM3Embeddings(BaseModel, Embeddings):
    """BGE-M3 embeddings, computed by FlagEmbedding's `BGEM3FlagModel` in this process.

    The model is loaded with the first text. Instances with equal model settings share it, and all
    methods may be called from any thread or event loop. With `base_url` a server of
    `langchain_bge_dense.serve` has the model, and nothing is loaded here.

    All methods that take texts raise `TypeError` for anything but a string, `ValueError` for a text
    that cannot be encoded or is too long with `on_truncate="raise"`, and `FloatingPointError` for
    an output that is non-finite in float32, too. These errors name the text by its index.

    Example:
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> embeddings = BGEM3Embeddings(model=checkpoint)
        >>> vector = embeddings.embed_query("what is a dense vector?")
        >>> len(vector) == embeddings.dimension
        True
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # it may be a key or a token
        use_attribute_docstrings=True,
    )

    model: str = Field("BAAI/bge-m3", validation_alias=AliasChoices("model", "model_name"))
    """Hub id, or local folder of a checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: SecretStr | None = None
    """Access token of the hub, by default the one that its own login stored."""
    cache_folder: str | None = None
    """Folder of downloads, by default the hub's own cache."""
    local_files_only: bool = False
    """Never ask the hub: files missing from the cache are an error."""
    device: str = "auto"
    """`"auto"` (CUDA, then MPS, then CPU) or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """`"auto"`: float16 on CUDA and MPS; on a CPU bfloat16 where it is the faster one.

    `"int8"` is for a CPU: weights take half of bfloat16's memory, and products are in int8.
    """
    base_url: str | None = None
    """Ask this server of `langchain_bge_dense.serve`: `http://host:port`, or `unix:///path`.

    The model runs here by default. With a server, the model's fields are the server's.
    """
    api_key: SecretStr | None = None
    """API key of the server."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """`"auto"`: what the checkpoint's `1_Pooling/config.json` says, else cls."""
    normalize: bool = True
    """Scale vectors to unit length, computed in float32."""
    max_length: int | None = Field(None, ge=3)
    """Longest text in tokens, by default as many as the checkpoint has positions for."""
    on_truncate: Literal["warn", "raise", "ignore"] = "warn"
    """What to do about a text that is longer than `max_length`."""
    query_instruction: str | None = None
    """Prefix of every query, by default the checkpoint's own prompt for queries, if it has one."""
    document_instruction: str | None = None
    """Prefix of every document, by default the checkpoint's own prompt for documents."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass, by default the number measured best for the device."""
    show_progress: bool = False
    """Show a bar over texts in `embed_documents` and `encode`."""

    _session: Any = PrivateAttr(None)
    _engine: Any = PrivateAttr(None)
    _pairs: Any = PrivateAttr(None)

    @field_validator("model", "cache_folder", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("base_url")
    @classmethod
    def _url_of_a_server(cls, url: str | None) -> str | None:
        if url is None or re.match("unix://.", url):
            return url
        with contextlib.suppress(ValueError):  # of a port that is not a number
            parts = urlsplit(url)
            if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
                return url.rstrip("/").removesuffix("/v1")  # which OpenAI's clients need
        msg = (
            f"base_url is {url!r}, which is not the URL of a server. "
            "Write http://host:8000, https://host, or unix:///path for a socket."
        )
        raise ValueError(msg)

    @model_validator(mode="before")
    @classmethod
    def _names_of_elsewhere(cls, fields: Any) -> Any:
        check_keywords(fields)
        return fields

    @model_validator(mode="after")
    def _model_in_one_place(self) -> Self:
        names = _OF_A_CLIENT if self.base_url is None else _OF_THE_MODEL
        defaults = {name: type(self).model_fields[name].default for name in names}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if given and self.base_url is None:
            msg = "api_key is for a server. Give its base_url, too, or leave api_key out."
            raise ValueError(msg)
        if given:
            msg = (
                f"{', '.join(given)} cannot be set for the model of the server {self.base_url}. "
                "Leave them out, and start the server with these settings."
            )
            raise ValueError(msg)
        return self

    def __eq__(self, other: object) -> bool:
        """Compare settings, whether a model is loaded or not."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __getstate__(self) -> dict[Any, Any]:
        """Reduce pickles and copies to the settings."""
        return {**super().__getstate__(), "__pydantic_private__": dict(_UNLOADED)}

    def __copy__(self) -> Self:
        copied = super().__copy__()
        # The copy's fields may be about to change: it finds and loads its own model.
        copied.__pydantic_private__ = dict(_UNLOADED)
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    @classmethod
    def from_flag_model(cls, flag: BGEM3FlagModel, **fields: Any) -> Self:
        """Take over a model that the caller has loaded, with the weights that it has now.

        Args:
            flag: A loaded `BGEM3FlagModel`.
            fields: Other fields of `BGEM3Embeddings`, such as `on_truncate`.

        Returns:
            Embeddings with the model's pooling, normalisation and instructions. A pickle of them
            loads the same checkpoint anew.

        Raises:
            ValueError: The model's instruction formats put more than a text in front.
            FileNotFoundError: The checkpoint's files were moved or deleted since they were loaded.

        Example:
            >>> embeddings = BGEM3Embeddings.from_flag_model(flag)
            >>> embeddings.pooling
            'cls'
        """
        from langchain_bge_dense._engine.engine import wrap

        engine, settings = wrap(flag)
        embeddings = cls(**{**settings, **fields})
        embeddings._engine, embeddings._session = engine, embeddings._read(engine.checkpoint)
        return embeddings

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed passages.

        Args:
            texts: N passages.

        Returns:
            N dense vectors of Python floats.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> vectors = embeddings.embed_documents(["a passage", "another"])
            >>> len(vectors)
            2
        """
        if hasattr(texts, "__len__") and len(texts) == 0:  # `not texts` would refuse an array
            return []
        return self._dense(texts, self.session().documents, show_progress=self.show_progress)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, ahead of documents that wait.

        Args:
            text: The query.

        Returns:
            Its dense vector of Python floats.

        Example:
            >>> vector = BGEM3Embeddings(model=checkpoint).embed_query("what is a vector?")
        """
        return self._dense([text], self.session().queries)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Run `embed_documents` for an event loop. Cancelling drops the texts that have not run."""
        if hasattr(texts, "__len__") and len(texts) == 0:  # `not texts` would refuse an array
            return []
        return await self._adense(texts, query=False)

    async def aembed_query(self, text: str) -> list[float]:
        """Run `embed_query` for an event loop. Cancelling drops the query."""
        return (await self._adense([text], query=True))[0]

    def _dense(self, texts: list[str], options: Options, **progress: bool) -> list[list[float]]:
        engine, pairs = self.engine(), self._pairs
        if pairs is None:
            return _floats(engine.encode(texts, options, **progress))
        return _floats(pairs.encode(engine, texts, options, **progress))

    async def _adense(self, texts: list[str], *, query: bool) -> list[list[float]]:
        engine, pairs = self._engine or await asyncio.to_thread(self.engine), self._pairs
        session = self.session()
        options = session.queries if query else session.documents
        if pairs is None:
            encoding = await engine.aencode(texts, options)
        else:
            encoding = await pairs.aencode(engine, texts, options)
        return await asyncio.to_thread(_floats, encoding)

    def embed_stream(self, texts: Iterable[str]) -> Iterator[NDArray[np.float32]]:
        """Embed passages from any iterable, in constant memory.

        Args:
            texts: Passages; up to two requests of 2,048 are read ahead of what is taken.

        Returns:
            An iterator of dense vectors, each `(D,)` float32, in the order of the passages. An
            error comes after the vectors of earlier requests.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> stream = embeddings.embed_stream(f"line {i}" for i in range(3))
            >>> [vector.dtype.name for vector in stream]
            ['float32', 'float32', 'float32']
        """
        return self.engine().stream(texts, self.session().documents)

    def encode(
        self,
        texts: Iterable[str],
        *,
        dense: bool = True,
        lexical: bool = False,
        colbert: bool = False,
        query: bool = False,
    ) -> M3Encoding:
        """Compute any of BGE-M3's three outputs in one forward pass.

        Args:
            texts: N texts.
            dense: Compute dense vectors, `(N, D)` float32.
            lexical: Compute lexical weights, N dicts of token id to weight.
            colbert: Compute ColBERT vectors, N arrays `(T_i, D)` float32.
            query: The texts are queries: `query_instruction` goes in front of them, and they go
                ahead of documents that wait.

        Returns:
            The outputs that were asked for, with token counts and what was truncated.

        Raises:
            ValueError: No output is asked for, or the checkpoint has no heads for it.

        Example:
            >>> encoding = BGEM3Embeddings(model=checkpoint).encode(["a passage"], lexical=True)
            >>> encoding.dense.shape[0], len(encoding.lexical)
            (1, 1)
        """
        session = self.session()
        return self.engine().encode(
            texts,
            session.queries if query else session.documents,
            dense=dense,
            lexical=lexical,
            colbert=colbert,
            show_progress=self.show_progress,
        )

    def count_tokens(self, text: str) -> int:
        """Count tokens without the special ones around a text: a splitter's `length_function`.

        Example:
            >>> BGEM3Embeddings(model=checkpoint).count_tokens("")
            0
        """
        return self.engine().count_tokens(text)

    def tokens(self, weights: dict[int, float]) -> dict[str, float]:
        """Spell the tokens of lexical weights, the largest weight first, for people to read.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> [weights] = embeddings.encode(["vector"], lexical=True).lexical
            >>> len(embeddings.tokens(weights)) == len(weights)
            True
        """
        return self.engine().token_strings(weights)

    @property
    def dimension(self) -> int:
        """Width of a dense vector. Reads the checkpoint's files, loads no weights."""
        return self.session().checkpoint.dimension

    @property
    def fingerprint(self) -> str:
        """A short string naming all that changes the vectors, but not device and dtype.

        It has letters, digits, `.`, `_` and `-` alone, so that it can name a folder or a namespace.
        The twelve digits behind the model's name are of the checkpoint's files: a copy under
        another name is known as the same model. Reads these files, loads no weights.

        Example:
            >>> fingerprint = BGEM3Embeddings(model=checkpoint).fingerprint
            >>> fingerprint.endswith("-cls")
            True
        """
        found, documents, queries = self.session()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", found.name)
        parts = [name, found.digest, found.modules.pooling]
        if not self.normalize:
            parts.append("unnormalized")
        instructions = {"query": queries.instruction, "document": documents.instruction}
        parts += [f"{kind}_{_digest(text)}" for kind, text in instructions.items() if text]
        return "-".join(parts)

    def load(self) -> Self:
        """Load the model now instead of with the first text.

        Raises:
            FileNotFoundError: There is no such model here or on the hub.
            ValueError: A setting does not fit the checkpoint or the machine.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint).load()
        """
        self.engine()
        self.session()
        return self

    def close(self) -> None:
        """Release the model, which is freed with its last user. A later call loads it again.

        Example:
            >>> BGEM3Embeddings(model=checkpoint).load().close()
        """
        self._engine = self._session = None

    def session(self) -> Session:
        """Read checkpoint and options, for the rest of this package, without loading weights."""
        session: Session | None = self._session  # read once: `close` may come at any moment
        if session is None:
            local = self.base_url is None
            found = self._read_checkpoint() if local else self.engine().checkpoint
            session = self._session = self._read(found)
        return session

    def engine(self) -> BaseEngine:
        """Load the model, for the other parts of this package."""
        engine: BaseEngine | None = self._engine  # read once: `close` may come at any moment
        if engine is None:
            engine = self._load() if self.base_url is None else self._connect(self.base_url)
            self._engine = engine
        return engine

    def pair(self, make: Callable[[], P]) -> P:
        """Share forward passes with the sparse side of a store from now on."""
        if self._pairs is None:
            self._pairs = make()
        pairs: P = self._pairs
        return pairs

    def _read(self, checkpoint: Checkpoint) -> Session:
        from langchain_bge_dense._engine.calls import Options

        prompts = checkpoint.modules.prompts
        query, document = self.query_instruction, self.document_instruction
        documents = Options(
            instruction=prompts.document if document is None else document,
            max_length=checkpoint.longest(self.max_length),
            on_truncate=self.on_truncate,
            normalize=self.normalize,
            batch_tokens=self.batch_tokens,
        )
        instruction = prompts.query if query is None else query
        queries = documents._replace(instruction=instruction, urgent=True)
        return Session(checkpoint, documents, queries)

    def _read_checkpoint(self) -> Checkpoint:
        token = None if self.token is None else self.token.get_secret_value()
        source = HubSource(
            self.model,
            self.revision,
            token,
            self.cache_folder,
            self.local_files_only,
            needs_modules=self.pooling == "auto",
        )
        folder = resolve(source)
        return read_checkpoint(folder, Path(self.model).name or folder.name, self.pooling)

    def _load(self) -> BaseEngine:
        from langchain_bge_dense._engine.engine import shared_engine

        # A wrong max_length, of which the session tells, should not cost the loading of weights.
        return shared_engine(self.session().checkpoint, self.device, self.dtype)

    def _connect(self, base_url: str) -> BaseEngine:
        from langchain_bge_dense._engine.client import shared_client

        key = None if self.api_key is None else self.api_key.get_secret_value()
        client = shared_client(base_url, key)
        client.checkpoint  # noqa: B018 - is asked for here, where a call may block
        return client


def _floats(encoding: M3Encoding) -> list[list[float]]:
    """Convert dense vectors to Python floats, row by row, so that other threads run meanwhile."""
    return [vector.tolist() for vector in encoding.dense]  # type: ignore[union-attr]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
