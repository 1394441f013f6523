"""Options of a command line: one for each setting of `BGEM3Embeddings`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo


def add_settings(group: argparse._ArgumentGroup, *, without: Sequence[str]) -> None:
    """Add an option for each setting. Options that are not given are absent from the result."""
    for name, field in BGEM3Embeddings.model_fields.items():
        if name not in without:
            _add_setting(group, name, field)


def _add_setting(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    how: dict[str, Any] = {}
    if field.annotation is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif get_origin(field.annotation) is Literal:
        how["choices"] = get_args(field.annotation)
    words = (field.description or "").partition("\n\n")[0].replace("%", "%%")
    words += f" [{'none' if field.default in {None, ''} else field.default}]"
    group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=words, **how)
