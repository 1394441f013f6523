"""The settings of `BGEM3Embeddings`, and the model that they name: found, loaded, let go.

Knows no text and no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
)

from langchain_bge_dense._checkpoint import Checkpoint
from langchain_bge_dense._engine import Engine, Settings, shared_engine, wrap
from langchain_bge_dense._memo import Memo

if TYPE_CHECKING:
    from FlagEmbedding import BGEM3FlagModel
    from typing_extensions import Self

_UNLOADED = {"_found": None, "_engine": None, "_memo": None}


class ModelSettings(BaseModel):
    """Fields of `BGEM3Embeddings` and the life of its model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = Field("BAAI/bge-m3", validation_alias=AliasChoices("model", "model_name"))
    """Hub id, or local folder of a checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: SecretStr | None = None
    """Access token of the hub; None: the one that the hub's own login stored."""
    cache_folder: str | None = None
    """Where downloads and converted weights are kept; None: the hub's own cache, and `~/.cache`."""
    local_files_only: bool = False
    """Never ask the hub: what is not in the cache is an error."""
    device: str = "auto"
    """`"auto"` (CUDA, then MPS, then CPU) or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """`"auto"`: float16 on CUDA and MPS; on a CPU bfloat16 where it has it in hardware.

    `"int8"` is for the OpenVINO backend: weights in int8, and products in int8 where the CPU can.
    """
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """What runs the model: `"auto"` is OpenVINO on a CPU where it is installed, else PyTorch."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """`"auto"`: what the checkpoint's `1_Pooling/config.json` says, else cls."""
    normalize: bool = True
    """Scale vectors to unit length, computed in float32."""
    max_length: int | None = Field(None, ge=3)
    """Longest text in tokens; None: as many as the checkpoint has positions for."""
    on_truncate: Literal["warn", "raise", "ignore"] = "warn"
    """What to do about a text that is longer than `max_length`."""
    query_instruction: str = ""
    """Put in front of every query."""
    document_instruction: str = ""
    """Put in front of every document."""
    batch_tokens: int | None = Field(None, ge=1)
    """Padded tokens per forward pass; None: measured best for the device."""
    show_progress: bool = False
    """Show a bar over texts in `embed_documents` and `encode`."""

    _found: Checkpoint | None = PrivateAttr(None)
    _engine: Engine | None = PrivateAttr(None)
    _memo: Memo | None = PrivateAttr(None)

    @field_validator("model", "cache_folder", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    def __getstate__(self) -> dict[Any, Any]:
        """Pickles and copies carry the settings alone."""
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
        """Wrap a model that the caller has loaded; it is used as it is, on its first device.

        Args:
            flag: A loaded `BGEM3FlagModel`.
            fields: Other fields of `BGEM3Embeddings`, such as `on_truncate`.

        Returns:
            Embeddings with the model's pooling, normalisation and instructions. A pickle of them
            loads the same checkpoint anew.

        Raises:
            ValueError: The model's instruction formats put more than a text in front.
            FileNotFoundError: The checkpoint's files are no longer where they were loaded from.

        Example:
            >>> from FlagEmbedding import BGEM3FlagModel
            >>> flag = BGEM3FlagModel(checkpoint, use_fp16=False, devices="cpu")
            >>> BGEM3Embeddings.from_flag_model(flag).pooling
            'cls'
        """
        engine, settings = wrap(flag)
        embeddings = cls(**{**settings, **fields})
        embeddings._engine, embeddings._found = engine, engine.checkpoint
        return embeddings

    @property
    def dimension(self) -> int:
        """Width of a dense vector. Reads the checkpoint's files, loads no weights."""
        return self._checkpoint().dimension

    @property
    def fingerprint(self) -> str:
        """A short string naming all that changes the vectors, but not device and dtype.

        The digits behind `@` are of the checkpoint's files, so that a copy under another name is
        known as the same model. Reads these files, loads no weights.
        """
        found = self._checkpoint()
        pooling = found.pooling if self.pooling == "auto" else self.pooling
        parts = [f"{found.name}@{found.digest} pooling={pooling} normalize={self.normalize}"]
        instructions = {"query": self.query_instruction, "document": self.document_instruction}
        parts += [f"{name}_instruction={text!r}" for name, text in instructions.items() if text]
        return " ".join(parts)

    def load(self) -> Self:
        """Load the model now instead of with the first text.

        Raises:
            FileNotFoundError: There is no such model here or on the hub.
            ValueError: A setting does not fit the checkpoint or the machine.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint).load()
        """
        self._loaded()
        return self

    def close(self) -> None:
        """Let go of the model, which is freed with its last user; a later call loads it again.

        Example:
            >>> BGEM3Embeddings(model=checkpoint).load().close()
        """
        self._engine = self._found = None

    def _checkpoint(self) -> Checkpoint:
        if self._found is None:
            self._found = self._settings().checkpoint()
        return self._found

    def _loaded(self) -> Engine:
        engine = self._engine
        if engine is None:
            self._longest()  # a wrong max_length should not cost the loading of the weights
            engine = self._engine = shared_engine(self._settings(), self._checkpoint())
        return engine

    def _settings(self) -> Settings:
        token = None if self.token is None else self.token.get_secret_value()
        same = (name for name in Settings._fields if name != "token")
        return Settings(token=token, **{name: getattr(self, name) for name in same})

    def _longest(self) -> int:
        positions = self._checkpoint().positions
        if self.max_length is not None and self.max_length > positions:
            msg = (
                f"max_length={self.max_length:,} is more than the {positions:,} positions of "
                f"{self.model!r}. Use {positions:,} or less."
            )
            raise ValueError(msg)
        return self.max_length or positions

    def _shared_memo(self) -> Memo:
        """From now on dense calls compute lexical weights too, for sparse calls to take."""
        if self._memo is None:
            self._memo = Memo()
        return self._memo
