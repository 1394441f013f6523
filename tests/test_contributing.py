"""CONTRIBUTING.md against the tree: its map, every path that it names, the lowest versions."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

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


def test_every_lowest_version_is_one_that_is_tested() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text("utf-8").splitlines()
    pins = dict(line.partition(" ;")[0].split("==") for line in lines if "==" in line)
    floors = {
        requirement.name.lower(): specifier.version
        for requirement in map(Requirement, requires("langchain-bge-dense"))
        if not re.search("dev|docs", str(requirement.marker))
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert len(floors) > 30
    assert {n: v for n, v in floors.items() if Version(pins[n]) != Version(v)} == {}
