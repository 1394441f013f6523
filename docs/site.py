"""Hooks of MkDocs: files from the rest of the repository, and the list of error messages."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import griffe
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "langchain_bge_dense"
README = "index.md"  # the name of README.md on the site
SHARED = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "compose.yaml"),
    *("benchmarks/README.md", "benchmarks/*.png", "examples/*.py", "examples/*.png"),
    "examples/*.ipynb",
)
MARKER = "<!-- errors -->"
PARTS = {  # headings, by the beginning of a module's path
    "chroma/": "Chroma",
    "serve/": "The server",
    "_engine/client.py": "Asking a server",
    "_engine/wire.py": "Asking a server",
    "_engine/": "Model, checkpoint and texts",
    "embeddings.py": "Model, checkpoint and texts",
    "": "Retriever, reranker, matches, other stores, Ray",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and what the pages link to, under the same paths as in the repository."""
    files.append(File.generated(config, README, abs_src_path=str(ROOT / "README.md")))
    for pattern in SHARED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links to files of the repository links inside the site."""
    if page.file.src_uri == README:
        return re.sub(r"\]\(docs/", "](", markdown)
    if MARKER in markdown:
        markdown = markdown.replace(MARKER, error_table())
    return re.sub(r"\]\(\.\./(?=benchmarks/|examples/|[A-Z]+\.md)", "](", markdown)


class Examples(griffe.Extension):
    """Show the example of a docstring as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")


class Message(NamedTuple):
    """An error or a warning of the package: its text, and what it is raised as."""

    text: str
    kind: str
    module: str


def messages() -> list[Message]:
    """Every `msg` of the package, in the order of its words."""
    found = {
        Message(text, kind, path.relative_to(PACKAGE).as_posix())
        for path in PACKAGE.rglob("*.py")
        for text, kind in messages_of(ast.parse(path.read_text("utf-8")))
    }
    return sorted(found, key=lambda message: message.text.lower().lstrip("… "))


def messages_of(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each `msg = ...` with the name of what is called with it next."""
    nodes = [node for node in ast.walk(module) if hasattr(node, "lineno")]
    uses = sorted((n.lineno, n) for n in nodes if isinstance(n, ast.Call) and takes_message(n))
    for node in nodes:
        if isinstance(node, ast.Assign) and is_message(node.targets[0]):
            call = next(call for line, call in uses if line > node.lineno)
            yield text_of(node.value), kind_of(call)


def takes_message(call: ast.Call) -> bool:
    return any(is_message(argument) for argument in call.args)


def is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "msg"


def kind_of(call: ast.Call) -> str:
    """Name the class, or "warning" where the message is not raised."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id  # type: ignore[attr-defined]
    return "warning" if name.startswith("warn") else name


def text_of(node: ast.AST) -> str:
    """Give the text of a message, with an ellipsis for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def error_table() -> str:
    """Write the messages as tables, one for each part of the package."""
    tables: dict[str, list[str]] = {part: [] for part in PARTS.values()}
    for text, kind, module in messages():
        part = next(part for start, part in PARTS.items() if module.startswith(start))
        tables[part].append(f"| {cell(text)} | `{kind}` |")
    return "\n\n".join(
        f"### {part}\n\n| message | raised as |\n|---|---|\n" + "\n".join(dict.fromkeys(rows))
        for part, rows in tables.items()
    )


def cell(text: str) -> str:
    """Write a text so that Markdown shows it in a table as it is."""
    plain = html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
    return re.sub(r"([*_`\[\]])", r"\\\1", plain)
