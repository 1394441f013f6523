"""README and site: snippets print what the pages say; links, settings and messages are there."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from langchain_ollama import OllamaEmbeddings
from messages import messages
from model_server import served

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import BGEM3Chroma, open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md*"))]
# A fence of `py` is for what only a cluster or a download can run; it is compiled alone.
SNIPPET = re.compile(
    r"^```python.*\n((?:.*\n)*?)```\n(?:\n?```text\n((?:.*\n)*?)```\n)?", re.MULTILINE
)
NOT_RUN = re.compile(r"^```py\n((?:.*\n)*?)```\n", re.MULTILINE)
OURS = re.compile(r"^from (langchain_bge_dense\S*) import (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|/)([^)#\s]+)(?:#[^)]*)?\)")
SETTING = re.compile(r"^\| `(\w+)` \| `(.*?)` \|", re.MULTILINE)
URL = "http://127.0.0.1:8000"
SMALL = 'BGEM3Embeddings(model="small-model")'


# Pairs of what one writes elsewhere and here, which `test_moving.py` runs.
MOVING = DOCS / "moving.md"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def model(small_checkpoint: Path) -> Iterator[BGEM3Embeddings]:
    """The small model as the pages load it, which share it."""
    embeddings = BGEM3Embeddings(model=str(small_checkpoint)).load()
    yield embeddings
    embeddings.close()


@pytest.fixture
def clone(tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The clone of a reader, who has built the small model in it."""
    (tmp_path / "small-model").symlink_to(small_checkpoint)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if SNIPPET.search(text(p)) and p != MOVING], ids=name
)
def test_snippets_print_what_the_page_says(page: Path, clone: Path, model: BGEM3Embeddings) -> None:
    server = served(model) if URL in text(page) else contextlib.nullcontext(URL)
    names: dict[str, Any] = {}
    with server as url:
        for code, expected in SNIPPET.findall(text(page)):
            small = code.replace("BGEM3Embeddings()", SMALL).replace(URL, url)
            assert run(small, names, name(page)) == expected
    for value in names.values():
        if isinstance(value, BGEM3Chroma):
            value.close()
        if isinstance(value, OllamaEmbeddings):
            value._client._client.close()
    written = {path.name for path in clone.iterdir()} - {"examples"}
    assert written <= {line.strip("/") for line in text(ROOT / ".gitignore").splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_that_is_not_run_compiles_and_imports_what_exists(page: Path) -> None:
    for code in NOT_RUN.findall(text(page)):
        compile(code, name(page), "exec")
        for module, names in OURS.findall(code):
            found = importlib.import_module(module)
            assert all(hasattr(found, each) for each in names.split(", "))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = LINK.findall(text(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_settings_are_the_fields() -> None:
    fields = {name: field.default for name, field in BGEM3Embeddings.model_fields.items()}
    rows = SETTING.findall(text(DOCS / "embeddings.md"))
    assert {name: eval(default) for name, default in rows} == fields  # noqa: S307


@pytest.mark.parametrize(
    "call",
    [
        lambda model: BGEM3Embeddings(model="./nowhere").load(),
        lambda model: model.embed_documents([None]),
        lambda model: model.encode(["text"], dense=False),
        lambda model: open_chroma(model, "a name"),
    ],
)
def test_errors_are_on_the_page_with_their_class(call: Any, model: BGEM3Embeddings) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the page says which
        call(model)
    assert any(
        each.kind == type(raised.value).__name__
        and re.fullmatch(re.escape(each.text).replace("…", ".*"), str(raised.value))
        for each in messages()
    )


def run(code: str, names: dict[str, Any], page: str) -> str:
    """What a snippet prints, warnings in front as a terminal shows them."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        exec(compile(code, page, "exec"), names)  # noqa: S102
    warned = [f"{w.category.__name__}: {w.message}\n" for w in caught if w.category is UserWarning]
    return "".join(warned) + printed.getvalue()
