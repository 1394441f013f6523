"""Each example where a package of it is not installed: one line, which is the first of its file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for path in sorted((ROOT / "examples").glob("*.py"))
    if f"python examples/{path.name}" in path.read_text("utf-8")
]
FIRST_LINE = r'"""(Needs the extras? [a-z and]+: in a clone, pip install "\.\[([a-z,]+)\]"\.)'
MISSING = {
    "dense_and_sparse": "rich",
    "hybrid_search": "bs4",
    "incremental_index": "langchain_classic",
    "quickstart": "chromadb",
    "ray_index": "ray",
    "retriever_chain": "mammoth",
    "small_model": "safetensors",
    "web_app": "uvicorn",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_missing_package_is_one_line(script: Path, tmp_path: Path) -> None:
    missing = MISSING[script.stem]
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    ran = subprocess.run(
        [sys.executable, script],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    first, extras = re.match(FIRST_LINE, script.read_text("utf-8")).groups()
    assert (ran.returncode, ran.stdout) == (1, "")
    [told] = ran.stderr.splitlines()
    assert missing in told
    assert told.endswith(first)
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(f"\n{extra} = [" in settings for extra in extras.split(","))


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    script = ROOT / "examples" / "quickstart.py"
    (tmp_path / "langchain.py").write_text("1 / 0")
    ran = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in ran.stderr
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")
