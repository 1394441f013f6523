"""The example that shows both sides of a passage, run as its user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dense_and_sparse import main
from tiny_m3 import build

if TYPE_CHECKING:
    import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "dense_and_sparse.py"


def run(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache:
        environment["HF_HUB_CACHE"] = str(cache)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment | {"PYTHONIOENCODING": "utf-8"},
    )


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.split()]


def check_report(report: str, dimensions: int) -> list[str]:
    passage, vector, weights = report.split("\n\n")
    dense, values = vector.splitlines()
    lexical, *rows = weights.splitlines()
    assert passage.startswith("Passage: ")
    assert dense == f"Dense vector: {dimensions} dimensions, the first ten:"
    assert len(numbers(values)) == 10
    assert int(lexical.split()[2].rstrip(",")) > 10
    shown = numbers(" ".join(row.split()[0] for row in rows))
    assert len(shown) == 10
    assert shown == sorted(shown, reverse=True)
    assert shown[-1] > 0
    return [re.fullmatch(r'\d\.\d{4}  "(.*)"', row)[1] for row in rows]


def test_a_checkpoint_folder(tiny_checkpoint: Path) -> None:
    ended = run("--model", str(tiny_checkpoint))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    tokens = check_report(ended.stdout, dimensions=32)
    passage = "".join(ended.stdout.split("\n\n")[0].splitlines())
    assert all(token in passage for token in tokens if token.isalpha())


def test_the_log_is_shown_on_request(tiny_checkpoint: Path) -> None:
    ended = run("--model", str(tiny_checkpoint), "--log-level", "info")
    assert "INFO: " in ended.stderr
    check_report(ended.stdout, dimensions=32)


def test_the_small_model_reads_chinese(small_checkpoint: Path) -> None:
    assert small_checkpoint.exists()  # built here, so that the script finds it in the cache
    ended = run("--small")
    assert ended.returncode == 0, ended.stderr
    tokens = check_report(ended.stdout, dimensions=384)
    assert {"词", "元"} & set(tokens)
    assert not {"的", "，", "。"} & set(tokens)


def test_no_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    ended = run(cache=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("Error: The model 'BAAI/bge-m3' is not complete in the cache")
    assert line.endswith("Or try --small, which needs no download.")


def test_a_checkpoint_without_heads_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(tmp_path / "headless", with_heads=False)
    assert main(["--model", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sparse_linear.pt" in printed.err.splitlines()[-1]
