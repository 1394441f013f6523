"""CONTRIBUTING.md against the tree: its map, and every path that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = re.compile(r"`([\w./-]+(?:\.(?:py|toml|txt|md)|/))`")
LINE = re.compile(r"^\| `([\w/]+\.py)` \| .+ \|$", re.MULTILINE)


def test_every_file_of_the_package_has_one_line() -> None:
    package = ROOT / "langchain_bge_dense"
    files = sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py"))
    lines, _, _ = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\nTo add\n")
    assert sorted(LINE.findall(lines)) == files


def test_every_path_that_the_page_names_exists() -> None:
    places = (ROOT, ROOT / "tests", ROOT / "langchain_bge_dense")
    named = PATH.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(named) > 40
    assert [path for path in named if not any((each / path).exists() for each in places)] == []
