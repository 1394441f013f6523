"""`BGEM3FlagModel`, to compare the package with.

Its class comes the way that the package takes: with some versions of transformers
`import FlagEmbedding` fails, for the sake of a model that is of no concern here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_bge_dense._engine.flag import flag_model_class

if TYPE_CHECKING:
    from pathlib import Path

    from FlagEmbedding import BGEM3FlagModel


def flag_model(folder: Path, **settings: Any) -> BGEM3FlagModel:
    return flag_model_class()(str(folder), use_fp16=False, devices="cpu", **settings)
