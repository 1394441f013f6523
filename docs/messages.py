"""The list of all error messages and warnings on the page of troubleshooting, from the code."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[1] / "langchain_bge_dense"
MARKER = "<!-- errors -->"
PARTS = {  # headings, by the beginning of a module's path
    "chroma/": "Chroma",
    "serve/": "The server",
    "_engine/client": "Asking a server",
    "": "Model, texts and search",
}

SAYING = {"warn_caller": "warning", "error": "command line", "exit": "command line"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the list in the place of its marker."""
    return markdown.replace(MARKER, tables()) if MARKER in markdown else markdown


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
    """Yield each `msg = ...` with the kind of the call that takes it, and texts in such a call."""
    nodes = list(ast.walk(module))
    calls = sorted((n for n in nodes if isinstance(n, ast.Call)), key=lambda n: n.lineno)
    takers = [call for call in calls if any(map(is_message, call.args))]
    for node in nodes:
        if isinstance(node, ast.Assign) and is_message(node.targets[0]):
            taker = next(call for call in takers if call.lineno > node.lineno)
            yield text_of(node.value), kind_of(taker)
    for call in calls:
        if kind_of(call) and call.args and isinstance(call.args[-1], (ast.Constant, ast.JoinedStr)):
            yield text_of(call.args[-1]), kind_of(call)


def is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "msg"


def kind_of(call: ast.Call) -> str:
    """Name the class of an error, or what else says a message; empty for other calls."""
    name = ast.unparse(call.func).rpartition(".")[2]
    return name if name.endswith("Error") else SAYING.get(name, "")


def text_of(node: ast.AST) -> str:
    """Give the text of a message, with an ellipsis for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def tables() -> str:
    """Write the messages as tables, one for each part of the package."""
    rows: dict[str, list[str]] = {part: [] for part in PARTS.values()}
    for text, kind, module in messages():
        part = next(part for start, part in PARTS.items() if module.startswith(start))
        rows[part].append(f"| {cell(text)} | `{kind}` |")
    return "\n\n".join(
        f"### {part}\n\n| message | raised as |\n|---|---|\n" + "\n".join(dict.fromkeys(lines))
        for part, lines in rows.items()
    )


def cell(text: str) -> str:
    """Write a text so that Markdown shows it in a table as it is."""
    plain = html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
    return re.sub(r"([*_`\[\]])", r"\\\1", plain)
