"""Packed weights and tokenizer of a checkpoint, in a file that later loads map.

The first load runs every check, through transformers and FlagEmbedding. Later ones need neither:
they map the file, and processes share the rows of its word embeddings. In float32 the weights stay
where they are, in the checkpoint, and the file says where: a second copy of 2.3 GB saves no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from langchain_bge_dense._engine.encoder import TextTokenizer
from langchain_bge_dense._engine.files import update_digest, weight_files
from langchain_bge_dense._engine.flag import installed_version
from langchain_bge_dense._engine.layers import PackedEncoder, Shape, converted
from langchain_bge_dense._engine.weights import CheckpointWeights, FileParts, write_parts

if TYPE_CHECKING:
    from langchain_bge_dense._engine.checkpoint import Checkpoint
    from langchain_bge_dense._engine.layers import Parts, Weights
    from langchain_bge_dense._engine.linear import LinearFactory

logger = logging.getLogger(__name__)

VARIABLE = "LANGCHAIN_BGE_DENSE_CACHE"
_KEPT_FILES = 3
_SUFFIX = ".packed.safetensors"  # a folder may hold safetensors of others
_PART = ".packed.part"
_SOFTWARE = ("langchain-bge-dense", "FlagEmbedding", "tokenizers", "torch", "transformers")


def cache_folder() -> Path | None:
    """Locate the files, in the hub's cache unless `VARIABLE` names a folder or turns them off."""
    from huggingface_hub import constants

    setting = os.environ.get(VARIABLE)
    if setting == "0":
        return None
    return Path(setting or Path(constants.HF_HOME) / "langchain-bge-dense").expanduser()


class PackedFile:
    """The file of one checkpoint in one dtype.

    Its name has a digest of all that decides its content, and one of the content.

    Args:
        folder: The cache.
        checkpoint: What `read_checkpoint` gave.
        dtype: A resolved dtype.
        linear: Makes the linear layers.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, dtype: str, linear: LinearFactory
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._linear = linear
        self._in_place = dtype == "float32"
        name = re.sub(r"[^\w.-]", "_", checkpoint.name, flags=re.ASCII)[:64]
        self._prefix = f"{name}-{dtype}-"
        self._key = self._digest()

    def _digest(self) -> str:
        """Digest the checkpoint's files as they are now, and the installed versions."""
        files = sorted(
            (entry.name, (status := entry.stat()).st_size, status.st_mtime_ns)
            for entry in os.scandir(self._checkpoint.folder)
            if entry.is_file()
        )
        software = [*map(installed_version, _SOFTWARE), *_sources()]
        content = (self._checkpoint.digest, files, self._linear.form, software)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def load(self) -> tuple[TextTokenizer, PackedEncoder] | None:
        """Load tokenizer and layers, or None if the file is missing or incomplete."""
        path = None
        try:
            path = next(self._folder.glob(f"{self._prefix}{self._key}-*{_SUFFIX}"), None)
            return None if path is None else self._load(path)
        except Exception as error:  # noqa: BLE001 - of parsers at a damaged file
            logger.info("%s is not used, and written anew: %s", path, error)
            return None

    def _load(self, path: Path) -> tuple[TextTokenizer, PackedEncoder]:
        _check(path)
        with contextlib.suppress(OSError):  # of a disk that is read-only
            os.utime(path)
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            if facts["key"] != self._key:
                msg = "it was renamed"
                raise ValueError(msg)
            text = bytes(file.get_tensor("tokenizer").numpy()).decode()
        tokenizer = TextTokenizer(_tokenizer_of(text), *facts["tokenizer"])
        parts: Parts = FileParts(path)
        if self._in_place:
            weights = CheckpointWeights(self._checkpoint.folder, facts["places"])
            parts = converted(weights, self._linear)
        return tokenizer, PackedEncoder(Shape(*facts["shape"]), parts, self._linear)

    def write(self, tokenizer: TextTokenizer, shape: Shape, weights: Weights) -> None:
        """Write the file, unless disk, tokenizer or weights do not let it.

        Args:
            tokenizer: Of the checkpoint.
            shape: Of its encoder.
            weights: Of its encoder.
        """
        places = getattr(weights, "places", None)
        text = _text_of(tokenizer.backend)
        if text is None or (self._in_place and places is None):
            return
        facts = {
            "key": self._key,
            "tokenizer": tokenizer[1:],
            "shape": shape,
            "places": places,
        }
        names = [] if self._in_place else shape.parts()
        parts = converted(weights, self._linear)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self._folder / "writing.lock", timeout=0):
                self._write(json.dumps(facts), text, names, parts)
        except (OSError, NotImplementedError, ValueError) as error:  # a lock's Timeout among them
            logger.info("The loaded weights are not kept in %s: %s", self._folder, error)

    def _write(self, facts: str, tokenizer: str, names: list[str], parts: Parts) -> None:
        for left in self._folder.glob(f"*{_PART}"):  # by a process that was killed
            left.unlink()
        if not self._in_place:
            _require_space(self._folder, self._checkpoint.folder)
        handle, name = tempfile.mkstemp(_PART, dir=self._folder)
        temporary = Path(name)
        try:
            with open(handle, "wb") as stream:  # noqa: PTH123 - a handle
                write_parts(stream, facts, tokenizer, names, parts)
            target = f"{self._prefix}{self._key}-{_content_digest(temporary)}{_SUFFIX}"
            if self._digest() == self._key:  # else files have changed since
                self._forget(f"{self._prefix}{self._key}-*{_SUFFIX}", 0)
                temporary.replace(self._folder / target)
        finally:
            temporary.unlink(missing_ok=True)
        self._forget(f"*{_SUFFIX}", _KEPT_FILES)

    def _forget(self, pattern: str, kept: int) -> None:
        """Delete files but the last used ones."""
        files = sorted(self._folder.glob(pattern), key=lambda path: -path.stat().st_mtime)
        for file in files[kept:]:
            with contextlib.suppress(OSError):  # in use, on Windows
                file.unlink()


def _text_of(tokenizer: Any) -> str | None:
    """Serialize a tokenizer as JSON, or give None if JSON does not preserve it."""
    try:
        text: str = tokenizer.to_str()
        again = _tokenizer_of(text).to_str()
    except Exception as error:  # noqa: BLE001 - tokenizers has no other, for parts in Python
        logger.info("The tokenizer cannot be kept: %s", error)
        return None
    return None if again != text or getattr(tokenizer, "encode_special_tokens", False) else text


def _tokenizer_of(text: str) -> Any:
    """Read a tokenizer from JSON.

    tokenizers rounds scores of Unigram when it parses them, so that other pieces may win.
    """
    content = json.loads(text)
    model = content["model"]
    if model["type"] != "Unigram":
        return Tokenizer.from_str(text)
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"] = {"type": "WordLevel", "vocab": ids, "unk_token": ""}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    vocabulary = list(map(tuple, model["vocab"]))
    tokenizer.model = Unigram(vocabulary, model["unk_id"], model.get("byte_fallback", False))
    return tokenizer


def _require_space(folder: Path, checkpoint: Path) -> None:
    """Check that the disk has room for a file."""
    needed = sum(file.stat().st_size for file in weight_files(checkpoint))
    free = shutil.disk_usage(folder).free
    if free < needed:
        msg = f"the disk has {free:,} bytes free, and {needed:,} are wanted"
        raise OSError(msg)


def _check(path: Path) -> None:
    """Check that only this user or root can have written a file, and that it is whole."""
    status = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    if hasattr(os, "getuid") and (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid not in (0, os.getuid())
        or status.st_mode & others
    ):
        msg = "others may have written it"
        raise PermissionError(msg)
    if not path.name.endswith(f"-{_content_digest(path)}{_SUFFIX}"):
        msg = "it is damaged"
        raise ValueError(msg)


def _content_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    update_digest(digest, path, size)
    return digest.hexdigest()[:12]


def _sources() -> list[bytes]:
    """Read the sources that write and read a file, so that a change of any renews it."""
    files = importlib.resources.files(__package__).iterdir()
    return sorted(file.read_bytes() for file in files if file.name.endswith(".py"))
