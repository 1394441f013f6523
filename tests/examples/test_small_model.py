"""The small checkpoint: right source, same tokens, heads that mean something, safe to build."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import small_model
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_bge_dense import BGEM3Embeddings

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
FEW = 40  # docstrings: enough for a head, few enough for a quick build
BUILD = f"""
import pathlib, sys, small_model
small_model.DOCSTRINGS = {FEW}
small_model.build(pathlib.Path(sys.argv[1]))
"""
TEXTS = [
    "",
    "The river Inn rises near the Maloja Pass; its glaciers are shrinking.",
    "Ünïcödé, 中文, emoji 😀 and\x00NULs",
    "[SEP] [CLS] [MASK] [PAD] [UNK] written out",
    "far more than a hundred and twenty-eight tokens " * 30,
]


def heads_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in HEADS]


def test_other_weights_are_refused_with_both_digests(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match=rf"{found}.*{small_model.WEIGHTS_SHA256}.*pip install"):
        small_model.check_weights(weights)


def test_build_returns_what_is_there(small_checkpoint: Path) -> None:
    before = (small_checkpoint / HEADS[1]).stat()
    assert small_model.build(small_checkpoint) == small_checkpoint
    assert (small_checkpoint / HEADS[1]).stat() == before


def test_processes_that_build_at_once_end_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared" / "small"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BUILD, str(shared)]
    builds = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [build.wait() for build in builds] == [0, 0]
    assert [path.name for path in shared.parent.iterdir()] == ["small"]
    monkeypatch.setattr(small_model, "DOCSTRINGS", FEW)
    assert heads_of(shared) == heads_of(small_model.build(tmp_path / "alone"))


def test_the_later_of_two_builds_keeps_the_earlier(small_checkpoint: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    later.mkdir()
    small_model.move_into_place(later, small_checkpoint)
    assert small_model.is_built(small_checkpoint)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    checkpoint, taken = tmp_path / "checkpoint", tmp_path / "taken"
    checkpoint.mkdir()
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists and is not the small checkpoint"):
        small_model.move_into_place(checkpoint, taken)
    assert (taken / "notes.txt").read_text() == "mine"


def test_weights_are_copied_where_links_are_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"weights")
    small_model.link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"weights"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert small_model.default_folder().parent == tmp_path / "langchain-bge-dense"


def test_encoder_and_tokens_are_those_of_the_source(small_checkpoint: Path) -> None:
    source = small_model.source_folder()
    ours, theirs = (load_file(f / "model.safetensors") for f in (small_checkpoint, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids, expected = (
        AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
        for folder in (small_checkpoint, source)
    )
    assert ids == expected


def test_colbert_head_is_the_identity(small_checkpoint: Path) -> None:
    head = torch.load(small_checkpoint / HEADS[0], weights_only=True)
    assert torch.equal(head["weight"], torch.eye(384))
    assert not head["bias"].any()


def test_lexical_weights_leave_out_cls_and_sep(
    small: BGEM3Embeddings, small_checkpoint: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_checkpoint)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    weights = small.encode(TEXTS[:3], lexical=True).lexical
    assert weights is not None
    assert weights[0] == {}
    assert all(weights[1:])
    assert not special & {token for each in weights for token in each}


def test_rare_words_weigh_more_than_common_ones(small: BGEM3Embeddings) -> None:
    [weights] = small.encode(["the glacier is in the valley of the Inn"], lexical=True).lexical
    named = small.tokens(weights)
    assert named["glacier"] > 1.5 * named["the"]
    assert named["valley"] > 1.5 * named["of"]


def test_docstrings_come_from_modules_classes_and_functions() -> None:
    source = b"""
'one'
class A:
    'two'
    async def b(self):
        'three'
        'four'
"""
    assert set(small_model.docstrings_of(source)) == {"one", "two", "three"}
