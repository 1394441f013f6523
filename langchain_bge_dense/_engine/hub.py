"""From a hub id or a path to the local folder of a checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from langchain_bge_dense._engine.checkpoint import POOLING_FILE, SMALL_FILES
from langchain_bge_dense._engine.modules import PROMPTS_FILE

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_SHARD = r"(-\d{5}-of-\d{5})?"
_WEIGHTS = re.compile(rf"(model{_SHARD}\.safetensors|pytorch_model{_SHARD}\.bin)(\.index\.json)?")

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the hub's library reads it at its import


@dataclass(frozen=True)
class HubSource:
    """A model on the hub or in a local folder, and how to get it.

    Attributes:
        model: Hub id or path.
        revision: Branch, tag or commit.
        token: Access token; None: the one that the hub's own login stored.
        cache_folder: The hub's cache; None: its default.
        local_files_only: Take what the cache holds and send no request.
    """

    model: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_folder: str | None = None
    local_files_only: bool = False


def resolve(source: HubSource) -> Path:
    """The local folder of a model, downloaded if need be.

    Raises:
        FileNotFoundError: Neither this machine nor the hub has the model.
        PermissionError: The hub refuses it to the holder of this token.
        ConnectionError: The download broke off.
        ValueError: The hub id is not valid, or a file in the cache is a link out of it.
    """
    folder = Path(source.model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not _HUB_ID.fullmatch(source.model):
        msg = (
            f"There is no model folder {source.model!r} (looked in {folder.absolute()}). Correct "
            "the path, or pass a hub id such as BAAI/bge-m3."
        )
        raise FileNotFoundError(msg)
    folder = _download(source)
    _check_links(folder)
    return folder


def _download(source: HubSource) -> Path:
    """Fetch the files that are needed and no others, weights as safetensors where there are both.

    With everything in the cache, one request asks what a branch or tag stands for.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from tqdm import tqdm

    no_bar = partial(tqdm, disable=True)  # the files beside the weights take seconds
    try:
        folder = _fetch(source, source.revision, [*SMALL_FILES, POOLING_FILE, PROMPTS_FILE], no_bar)
        if weights := _missing_weights(source, folder):
            _fetch(source, folder.name, weights)
    except (OSError, HTTPError, RuntimeError) as error:  # the last one by hf_xet
        if isinstance(error, OSError) and error.errno:  # the disk's, not the hub's
            raise
        raise _explain(error, source) from error
    return folder


def _fetch(source: HubSource, revision: str | None, files: list[str], bar: Any = None) -> Path:
    from huggingface_hub import constants, snapshot_download

    if os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1":  # the caller may have imported it before
        constants.HF_HUB_DISABLE_TELEMETRY = True
    folder = snapshot_download(
        source.model,
        revision=revision,
        token=source.token,
        cache_dir=source.cache_folder,
        local_files_only=source.local_files_only,
        allow_patterns=files,
        tqdm_class=bar,
    )
    return Path(folder)


def _missing_weights(source: HubSource, folder: Path) -> list[str]:
    """Weight files that the hub lists and the snapshot lacks."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        listed = get_cached_repo_tree(
            source.model, revision=folder.name, cache_dir=source.cache_folder
        )
    except CachedRepoTreeNotFoundError:  # without the hub, in a cache that others filled
        return []
    names = [file.path for file in listed if _WEIGHTS.fullmatch(file.path)]
    preferred = [name for name in names if ".safetensors" in name] or names
    return [name for name in preferred if not (folder / name).exists()]


def _explain(error: Exception, source: HubSource) -> OSError:
    """The hub's error as a builtin one that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    absent = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError)
    kind: type[OSError]
    if isinstance(error, GatedRepoError) or (
        status == HTTPStatus.UNAUTHORIZED and not isinstance(error, absent)
    ):
        kind = PermissionError
        advice = "Ask for access on the model's page, and pass a token that may read it as `token`."
    elif isinstance(error, absent):
        kind = FileNotFoundError
        advice = (
            "Check the name, and `token` for a private model; pass a local folder as `model`; set "
            "HF_ENDPOINT to a mirror; or, on a machine with access, run "
            f'`hf download {source.model} --exclude "onnx/*" --local-dir FOLDER` and copy FOLDER '
            "here."
        )
    else:
        kind, advice = ConnectionError, "Try again: files that are complete are kept."
    revision = f" at revision {source.revision!r}" if source.revision else ""
    return kind(
        f"The model {source.model!r}{revision} is not complete in the cache "
        f"{source.cache_folder or constants.HF_HUB_CACHE}, and {constants.ENDPOINT} does not "
        f"provide it. {advice}\n{type(error).__name__}: {error}"
    )


def _check_links(folder: Path) -> None:
    """Refuse a snapshot with links to anything but files of the hub's cache."""
    model = folder.parents[1]
    roots = (model.resolve(), model.parent.resolve())  # either may be a link of the user's own
    for file in folder.rglob("*"):
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in roots):
            msg = (
                f"The downloaded file {file} is a link out of the cache, to {target}. The hub "
                f"makes no such links: find out who did, delete {folder} and download it again."
            )
            raise ValueError(msg)
