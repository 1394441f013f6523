"""From a hub id or a path to the local folder of a checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

from langchain_bge_dense._engine.checkpoint import SMALL_FILES
from langchain_bge_dense._engine.modules import MODULES_FILE, MODULES_FILES, listed_modules

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
        token: Access token, by default the one that the hub's own login stored.
        cache_folder: The cache folder, by default the hub's own.
        local_files_only: Take what the cache holds and send no request.
        needs_modules: Whether it has to be known what sentence-transformers' files say.
    """

    model: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_folder: str | None = None
    local_files_only: bool = False
    needs_modules: bool = False


def resolve(source: HubSource) -> Path:
    """Find the local folder of a model, and download it if need be."""
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
    if source.needs_modules:
        _require_modules(source, folder)
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
        folder = _fetch(source, source.revision, [*SMALL_FILES, *MODULES_FILES], no_bar)
        if files := _missing_files(source, folder):
            _fetch(source, folder.name, files)
    except (OSError, HTTPError, RuntimeError) as error:  # the last one by hf_xet
        if isinstance(error, OSError) and error.errno:  # the disk's, not the hub's
            raise
        raise _explain(error, source) from error
    return folder


def _fetch(source: HubSource, revision: str | None, files: list[str], bar: Any = None) -> Path:
    from huggingface_hub import constants, snapshot_download

    # The caller may have imported it before, or have changed the environment since.
    if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1") == "1":
        constants.HF_HUB_DISABLE_TELEMETRY = True
    folder = snapshot_download(
        source.model,
        revision=revision,
        token=source.token,
        cache_dir=source.cache_folder,
        local_files_only=_is_offline(source),  # else a client is made, even with HF_HUB_OFFLINE
        allow_patterns=files,
        tqdm_class=bar,
    )
    return Path(folder)


def _is_offline(source: HubSource) -> bool:
    from huggingface_hub import constants

    return source.local_files_only or constants.HF_HUB_OFFLINE


def _missing_files(source: HubSource, folder: Path) -> list[str]:
    """Name the weights, and the files of modules in their own folders, that the snapshot lacks."""
    listed = _listing(source, folder) or []
    needed = []
    for part in {module.path for module in listed_modules(folder)}:
        names = [name for name in listed if name.parent == PurePosixPath(part)]
        weights = [name for name in names if _WEIGHTS.fullmatch(name.name)]
        needed += [name for name in weights if ".safetensors" in name.name] or weights
        needed += [name for name in names if name.name in (*SMALL_FILES, *MODULES_FILES)]
    return [str(name) for name in needed if not (folder / name).exists()]


def _listing(source: HubSource, folder: Path) -> list[PurePosixPath] | None:
    """List a commit's files, or None without the hub in a cache that others filled."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(
            source.model, revision=folder.name, cache_dir=source.cache_folder
        )
    except CachedRepoTreeNotFoundError:
        return None
    return [PurePosixPath(file.path) for file in files]


def _require_modules(source: HubSource, folder: Path) -> None:
    """Check that a snapshot from another program has all files that change the vectors."""
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(
        source.model, MODULES_FILE, cache_dir=source.cache_folder, revision=folder.name
    )
    if known is None and _listing(source, folder) is None:
        msg = (
            f"The cached snapshot {folder} of {source.model!r} lacks {MODULES_FILE}, if the model "
            "has one: what filled the cache did not ask for it, and the hub cannot be asked now. "
            'Load the model once with the hub, or pass pooling="cls" or "mean".'
        )
        raise FileNotFoundError(msg)


def _explain(error: Exception, source: HubSource) -> OSError:
    """Translate the hub's error into a builtin one that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{constants.ENDPOINT} does not provide it"
    online = "Check the name, and `token` for a private model; set HF_ENDPOINT to a mirror; "
    if _is_offline(source):
        switch = "local_files_only=True" if source.local_files_only else "HF_HUB_OFFLINE"
        asked = f"the hub was not asked, because of {switch}"
        online = "Leave that out to ask it; "
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    absent = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError)
    kind: type[OSError]
    if isinstance(error, GatedRepoError) or (
        status == HTTPStatus.UNAUTHORIZED and not isinstance(error, absent)
    ):
        kind = PermissionError
        advice = "Ask for access on the model's page, and pass a token that may read it as `token`."
    elif isinstance(error, absent) and "/" not in source.model:
        kind = FileNotFoundError
        advice = (
            f"There is no folder {source.model!r} here either. Correct the path, or pass a hub id "
            "with its owner, such as BAAI/bge-m3."
        )
    elif isinstance(error, absent):
        kind = FileNotFoundError
        advice = (
            f"{online}pass a local folder as `model`; or, on a machine with access, run "
            f'`hf download {source.model} --exclude "onnx/*" --local-dir FOLDER` and copy FOLDER '
            "here."
        )
    else:
        kind, advice = ConnectionError, "Try again: files that are complete are kept."
    revision = f" at revision {source.revision!r}" if source.revision else ""
    return kind(
        f"The model {source.model!r}{revision} is not complete in the cache "
        f"{source.cache_folder or constants.HF_HUB_CACHE}, and {asked}. "
        f"{advice}\n{type(error).__name__}: {error}"
    )


def _check_links(folder: Path) -> None:
    """Reject a snapshot with links to anything but files of the hub's cache."""
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
