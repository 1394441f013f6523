"""The README: its snippets run as printed, its table of settings is the fields'."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_server import served

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)
SETTING = re.compile(r"^\| `(\w+)` \| `(.*?)` \|", re.MULTILINE)


def text() -> str:
    return README.read_text(encoding="utf-8")


def test_the_first_example_and_its_output_come_before_line_25() -> None:
    lines = text().splitlines()
    assert lines.index("```text") < 25
    assert len(lines) < 200
    assert [line for line in lines if len(line) > 100] == []


def test_snippets_print_what_the_page_says(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small-model").symlink_to(small_checkpoint)
    names: dict[str, Any] = {}
    snippets = SNIPPET.findall(text())
    assert len(snippets) >= 4
    with served(BGEM3Embeddings(model="small-model")) as url:
        for code, expected in snippets:
            assert run(code.replace("http://127.0.0.1:8000", url), names) == expected
        with names["client"] as client:
            found = client.embeddings.create(model="bge-m3", input="trout").data[0].embedding
        local, shared = names["embeddings"], names["shared"]
        assert found == shared.embed_documents(["trout"])[0] == local.embed_documents(["trout"])[0]
    names["store"].close()


def test_what_the_snippets_and_quickstart_write_is_not_committed() -> None:
    folders = {"db", *re.findall(r'persist_directory="(.+?)"', text())}
    ignored = README.with_name(".gitignore").read_text("utf-8").splitlines()
    assert {f"/{folder}/" for folder in folders} <= {*ignored}


def test_the_settings_are_the_fields() -> None:
    fields = {name: field.default for name, field in BGEM3Embeddings.model_fields.items()}
    assert {name: eval(default) for name, default in SETTING.findall(text())} == fields  # noqa: S307


def run(code: str, names: dict[str, Any]) -> str:
    """What a snippet prints, warnings in front as a terminal shows them."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    warned = [f"{w.category.__name__}: {w.message}\n" for w in caught if w.category is UserWarning]
    return "".join(warned) + printed.getvalue()
