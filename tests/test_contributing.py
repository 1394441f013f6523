"""The map in CONTRIBUTING.md names every file of the package, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^\| `([\w/]+\.py)` \| .+ \|$", re.MULTILINE)


def test_every_file_of_the_package_has_one_line() -> None:
    package = ROOT / "langchain_bge_dense"
    files = sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py"))
    lines, _, _ = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\nTo add\n")
    assert sorted(LINE.findall(lines)) == files
