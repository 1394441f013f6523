"""The files of a checkpoint from the hub or its cache: those that are needed and no others.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as _HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from langchain_bge_dense._checkpoint import POOLING_FILE, SMALL_FILES

SAFETENSORS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
)
PYTORCH_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-?????-of-?????.bin",
)

_BAR_AFTER_SECONDS = 1

# For a caller who imported the hub's library before this package set the variable.
if os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1":
    constants.HF_HUB_DISABLE_TELEMETRY = True


def download(
    model: str,
    *,
    revision: str | None,
    token: str | None,
    cache_folder: str | None,
    local_files_only: bool,
) -> Path:
    """Bring a checkpoint's files into the hub's cache, weights as safetensors where there are both.

    What is there already is not fetched again: with everything in the cache one request is left,
    which asks what a branch or tag stands for, and none for a commit or without the hub.

    Returns:
        The folder of the snapshot.

    Raises:
        FileNotFoundError: The model is neither in the cache nor to be had from the hub.
        PermissionError: The hub does not give it to the holder of this token.
        ConnectionError: The download broke off.
        ValueError: `model` is not a valid hub id, or a file in the cache leads out of it.
    """

    def fetch(revision: str | None, patterns: tuple[str, ...]) -> Path:
        folder = snapshot_download(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_folder,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
            tqdm_class=_LateBar,
        )
        return Path(folder)

    try:
        folder = fetch(revision, (*SMALL_FILES, POOLING_FILE, *SAFETENSORS))
        if not any((folder / name).exists() for name in SAFETENSORS):
            folder = fetch(folder.name, PYTORCH_WEIGHTS)
    except (OSError, _HTTPError, RuntimeError) as error:  # the last one by hf_xet
        if isinstance(error, OSError) and error.errno:  # the disk's, not the hub's
            raise
        name = f"{model!r} at revision {revision!r}" if revision else repr(model)
        raise _explain(error, name, model, cache_folder) from error
    _refuse_ways_out(folder, Path(cache_folder or constants.HF_HUB_CACHE).expanduser())
    return folder


def _explain(error: Exception, name: str, model: str, cache: str | None) -> OSError:
    reason = _reason(error)
    if _is_refusal(error):
        return PermissionError(
            f"The hub {constants.ENDPOINT} does not give out the model {name} ({reason}). Ask for "
            "access on the model's page, and pass a token that may read it as `token`."
        )
    if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError)):
        return FileNotFoundError(
            f"The model {name} is neither in the cache {cache or constants.HF_HUB_CACHE} nor to be "
            f"had from {constants.ENDPOINT} ({reason}). Check the name, and `token` for a private "
            "model; pass a local folder as `model`; set HF_ENDPOINT to a mirror; or, on a machine "
            f'with access, run `hf download {model} --exclude "onnx/*" --local-dir FOLDER` and '
            "copy FOLDER here."
        )
    return ConnectionError(
        f"The download of the model {name} from {constants.ENDPOINT} broke off ({reason}). "
        "Try again: files that are complete are kept."
    )


def _is_refusal(error: Exception) -> bool:
    """Whether the hub knows the model and the caller, and still says no."""
    if isinstance(error, RepositoryNotFoundError):
        # Of a private model the hub says the same as of one that does not exist.
        return isinstance(error, GatedRepoError)
    unauthorized = HTTPStatus.UNAUTHORIZED
    return isinstance(error, HfHubHTTPError) and error.response.status_code == unauthorized


def _reason(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return "no such model there, or a private one"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision there"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _refuse_ways_out(folder: Path, cache: Path) -> None:
    """Refuse a snapshot with links to anything but the cache's own files."""
    homes = (folder.parents[1].resolve(), cache.resolve())
    for file in folder.rglob("*"):
        target = file.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            msg = (
                f"The downloaded file {file} is a link out of the cache, to {target}. The hub "
                f"makes no such links: find out who did, delete {folder} and download it again."
            )
            raise ValueError(msg)


class _LateBar(tqdm):
    """The hub's bar, unseen where nothing or little is downloaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["delay"] = _BAR_AFTER_SECONDS
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def display(self, *args: Any, **kwargs: Any) -> Any:
        return time.time() > self.start_t + _BAR_AFTER_SECONDS and super().display(*args, **kwargs)
