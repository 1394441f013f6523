"""The image of the server: what it copies suffices to install it, and versions are those here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from langchain_bge_dense.serve.command import _parser

ROOT = Path(__file__).parents[1]
COPY = re.compile(r"^COPY (.+) (\S+)$", re.MULTILINE)


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def copied() -> set[str]:
    return {name for names, _ in COPY.findall(dockerfile()) for name in names.split()}


def test_what_is_copied_is_let_in_and_suffices_to_install(tmp_path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels"]
    command = [sys.executable, "-m", "pip", "wheel", *options, ".[serve]"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(list((tmp_path / "wheels").glob("langchain_bge_dense-*.whl"))) == 1


def test_the_server_takes_the_options_that_it_is_started_with() -> None:
    start = json.loads(re.search(r"^ENTRYPOINT (.+)$", dockerfile(), re.MULTILINE)[1])
    assert start[:3] == ["python", "-m", "langchain_bge_dense.serve"]
    assert _parser().parse_args(start[3:]).host == "0.0.0.0"  # noqa: S104


def test_a_chroma_server_of_the_pinned_version_stands_beside() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    _, version = services["chroma"]["image"].split(":")
    assert f"chromadb=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
