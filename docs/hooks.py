"""The site holds what its pages link to, under the paths that the repository has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
README = "index.md"  # the name of README.md on the site
SHARED = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "compose.yaml"),
    *("benchmarks/README.md", "benchmarks/*.png", "examples/*.py", "examples/*.png"),
    "examples/*.ipynb",
)


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
    return re.sub(r"\]\(\.\./(?=benchmarks/|examples/|compose\.yaml|[A-Z]+\.md)", "](", markdown)


class Examples(griffe.Extension):
    """Show the example of a docstring as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
