"""What the files of sentence-transformers say of a checkpoint, read in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from langchain_bge_dense._engine.files import damaged, read_json

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS_FILE = "config_sentence_transformers.json"

_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Prompts(NamedTuple):
    """What a checkpoint's authors put in front of texts; empty: nothing."""

    query: str = ""
    document: str = ""


def read_prompts(folder: Path) -> Prompts:
    """The prompts of a checkpoint for queries and documents.

    The default prompt is for both in a checkpoint that names none for either.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / PROMPTS_FILE
    if not file.exists():
        return Prompts()
    config = read_json(file)
    named = config.get("prompts") or {}
    if not isinstance(named, dict) or not all(
        isinstance(p, (str, type(None))) for p in named.values()
    ):
        raise damaged(file, f"its prompts are {named!r}")
    query, document = (
        next(filter(None, map(named.get, names)), "")
        for names in (_QUERY_PROMPTS, _DOCUMENT_PROMPTS)
    )
    if query or document:
        return Prompts(query, document)
    default = named.get(config.get("default_prompt_name")) or ""
    return Prompts(default, default)
