"""The lines to copy, run as their user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", *map(str, arguments)],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "PYTHONIOENCODING": "utf-8",
        },
    )


def test_it_finds_the_passage_that_answers(tmp_path: Path, small_checkpoint: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "more").mkdir(parents=True)
    (notes / "bees.md").write_text("Bees make honey from nectar.", "utf-8")
    (notes / "more" / "trains.txt").write_text("Express trains do not stop here.", "utf-8")
    (notes / "old.txt").write_bytes("Pâté".encode("latin-1"))
    (notes / "table.csv").write_text("not,read", "utf-8")
    options = ["--model", small_checkpoint, "--db", tmp_path / "db"]
    ended = run(notes, "What do bees make?", *options)
    assert ended.returncode == 0, ended.stderr
    left_out, first, second = ended.stdout.strip().split("\n\n")
    assert left_out == f"{notes}/old.txt is left out: it is not UTF-8."
    assert first == f"{notes}/bees.md\nBees make honey from nectar."
    assert second.startswith(f"{notes}/more/trains.txt\n")


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_text_is_named(
    tmp_path: Path, small_checkpoint: Path, folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text("\n")
    options = ["--model", small_checkpoint, "--db", tmp_path / "db"]
    ended = run(tmp_path / folder, "What?", *options)
    assert ended.returncode == 2
    assert f"error: {tmp_path / folder} has no .md or .txt file with text" in ended.stderr
    assert not (tmp_path / "db").exists()


def test_it_is_short() -> None:
    lines = (ROOT / "examples" / "quickstart.py").read_text("utf-8").splitlines()
    assert len(lines) <= 62
