"""The lines to copy, run as their user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_finds_the_passage_that_answers(tmp_path: Path, small_checkpoint: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "more").mkdir(parents=True)
    (notes / "bees.md").write_text("Bees make honey from nectar.", "utf-8")
    (notes / "more" / "trains.txt").write_text("Express trains do not stop here.", "utf-8")
    (notes / "table.csv").write_text("not,read", "utf-8")
    script = ROOT / "examples" / "quickstart.py"
    options = ["--model", str(small_checkpoint), "--db", str(tmp_path / "db")]
    ended = subprocess.run(
        [sys.executable, str(script), str(notes), "What do bees make?", *options],
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
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.strip().split("\n\n")
    assert first == f"{notes}/bees.md\nBees make honey from nectar."
    assert second.startswith(f"{notes}/more/trains.txt\n")


def test_it_is_short() -> None:
    lines = (ROOT / "examples" / "quickstart.py").read_text("utf-8").splitlines()
    assert len(lines) <= 52
