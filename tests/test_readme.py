"""Each Python snippet of the README runs as printed and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def test_the_first_example_and_its_output_come_before_line_25() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.index("```text") < 25
    assert len(lines) < 150


def test_snippets_print_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("small_model.build", lambda: small_checkpoint)
    names: dict[str, Any] = {}
    snippets = SNIPPET.findall(README.read_text(encoding="utf-8"))
    assert len(snippets) >= 4
    for code, expected in snippets:
        assert run(code, names) == expected


def run(code: str, names: dict[str, Any]) -> str:
    """What a snippet prints, warnings in front as a terminal shows them."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    told = [f"{w.category.__name__}: {w.message}\n" for w in caught if w.category is UserWarning]
    return "".join(told) + printed.getvalue()
