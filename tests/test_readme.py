"""The README is short, and shows code that works first."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_and_its_output_come_before_line_25() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.index("```text") < 25
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 100] == []
