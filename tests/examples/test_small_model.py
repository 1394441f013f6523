"""The small checkpoint: its layout, its tokens, heads that mean something, safe to build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import small_model
import torch

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from pathlib import Path

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
BUILD = """
import pathlib, sys, small_model
small_model.DOCUMENTS = pathlib.Path(sys.argv[2])
small_model.build(pathlib.Path(sys.argv[1]))
"""
CHINESE = "猢狲施展烈焰拳,击退妖怪;随后开启金刚体,抵挡神兵攻击。"


def test_build_returns_what_is_there(small_checkpoint: Path) -> None:
    before = (small_checkpoint / HEADS[1]).stat()
    assert small_model.build(small_checkpoint) == small_checkpoint
    assert (small_checkpoint / HEADS[1]).stat() == before


def test_processes_that_build_at_once_end_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    text = "The river Inn rises near the Maloja Pass; its glaciers are shrinking."
    (tmp_path / "texts" / "inn.txt").write_text(text, encoding="utf-8")
    shared = tmp_path / "shared" / "small"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BUILD, str(shared), str(tmp_path / "texts")]
    builds = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [build.wait() for build in builds] == [0, 0]
    assert [path.name for path in shared.parent.iterdir()] == ["small"]
    monkeypatch.setattr(small_model, "DOCUMENTS", tmp_path / "texts")
    alone = small_model.build(tmp_path / "alone")
    for name in HEADS:
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


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


def test_the_cache_follows_the_environment_and_what_the_folder_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = small_model.default_folder()
    assert first.parent == tmp_path / "langchain-bge-dense"
    (tmp_path / "more.md").write_text("other texts to fit on")
    monkeypatch.setattr(small_model, "DOCUMENTS", tmp_path)
    assert small_model.default_folder() != first


def test_the_prompts_are_those_of_e5(small_checkpoint: Path) -> None:
    file = small_checkpoint / "config_sentence_transformers.json"
    prompts = {"query": "query: ", "document": "passage: "}
    assert json.loads(file.read_text("utf-8")) == {"prompts": prompts, "default_prompt_name": None}


def test_a_sentence_has_the_ids_that_bge_m3_published(small_checkpoint: Path) -> None:
    """FlagEmbedding's own example prints 23 lexical weights of BGE-M3, among them these ids."""
    plain = BGEM3Embeddings(model=str(small_checkpoint), document_instruction="")
    [weights] = plain.encode([CHINESE], lexical=True).lexical
    assert len(weights) == 23
    published = [6, 28323, 8869, 48124, 213212, 75133, 4, 31833, 12461, 101184]
    spelled = plain.tokens(dict.fromkeys(published, 1.0))
    assert set(published) <= set(weights)
    assert [*spelled] == ["", "施", "展", "烈", "焰", "拳", ",", "击", "退", "妖"]
    assert set("".join(plain.tokens(weights))) == set(CHINESE) - set("猢狲")


def test_letters_of_full_width_are_those_of_half_width(prompted: BGEM3Embeddings) -> None:
    half = "ZB-2204"
    full = "".join(chr(ord(letter) + 0xFEE0) for letter in half)
    one, other = prompted.encode([half, full], lexical=True).lexical
    assert one.keys() == other.keys()


def test_colbert_vectors_of_different_texts_point_different_ways(
    prompted: BGEM3Embeddings, small_checkpoint: Path
) -> None:
    head = torch.load(small_checkpoint / HEADS[0], weights_only=True)
    assert torch.equal(head["weight"], torch.eye(384))
    texts = ["Bees make honey from nectar.", "Express trains do not stop here.", "干白葡萄酒"]
    one, two, three = prompted.encode(texts, colbert=True).colbert
    for first, second in ((one, two), (one, three), (two, three)):
        assert np.abs((first[2:-1] @ second[2:-1].T).mean()) < 0.25  # of e5's own states: 0.8


@pytest.mark.parametrize("query", [False, True])
def test_lexical_weights_leave_out_cls_and_eos(prompted: BGEM3Embeddings, query: bool) -> None:
    texts = ["", "The river Inn rises near the Maloja Pass.", "中文, emoji 😀 and\x00NULs"]
    lexical = prompted.encode(texts, lexical=True, query=query).lexical
    assert all(lexical[1:])
    assert not {0, 1, 2, 3} & {token for each in lexical for token in each}


@pytest.mark.parametrize(
    ("text", "rare", "common"),
    [
        ("the glacier is in the valley of the Inn", ("glaci", "valle", "Inn"), ("the", "of", "is")),
        ("冰川在因河的山谷里。", ("冰", "谷"), ("的", "。")),
    ],
)
def test_rare_words_weigh_more_than_common_ones(
    prompted: BGEM3Embeddings, text: str, rare: tuple[str, ...], common: tuple[str, ...]
) -> None:
    [weights] = prompted.encode([text], lexical=True).lexical
    named = prompted.tokens(weights)
    assert min(named[word] for word in rare) > 1.4 * max(named.get(word, 0) for word in common)
