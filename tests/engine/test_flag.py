"""FlagEmbedding's model class without the rest of FlagEmbedding, whoever else imports that."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAG = Path(importlib.util.find_spec("FlagEmbedding").origin).parent
BROKEN = "raise ImportError('No module named transformers.modeling_attn_mask_utils')\n"
LOAD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from langchain_bge_dense import BGEM3Embeddings

def ours():
    embeddings = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype="float32")
    return embeddings.embed_query("free and equal")

def theirs():
    try:
        from FlagEmbedding import BGEM3FlagModel
    except ImportError:  # as it does by itself with this transformers: ours has to go on
        assert sys.argv[2] == "broken"
        return ours()
    flag = BGEM3FlagModel(sys.argv[1], use_fp16=False, devices="cpu")
    return flag.encode(["free and equal"])["dense_vecs"][0]

def close(one, other):
    assert sum(a * b for a, b in zip(one, other, strict=True)) > 0.999999
"""


def run(code: str, *arguments: object, folder: Path | None = None) -> str:
    """Output of a new process; `folder` has packages that go before the installed ones."""
    paths = [str(folder)] if folder else []
    paths += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout


def test_a_load_imports_nothing_of_flagembedding_that_others_can_see(tiny_checkpoint: Path) -> None:
    code = "ours(); print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = run(LOAD + code, tiny_checkpoint).split()
    assert "transformers" in loaded
    assert not {"FlagEmbedding", "datasets", "peft", "sentence_transformers"} & {*loaded}


@pytest.mark.parametrize(
    "order",
    [
        "close(ours(), theirs())",
        "close(theirs(), ours())",
        """
import transformers  # whose own first import by two threads at once fails
with ThreadPoolExecutor() as pool:
    close(*[call.result() for call in [pool.submit(theirs), pool.submit(ours)]])
""",
    ],
    ids=["before", "after", "meanwhile"],
)
def test_flagembedding_can_be_imported(order: str, tiny_checkpoint: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-c", "import FlagEmbedding"], stderr=subprocess.DEVNULL, check=False
    )
    run(LOAD + order, tiny_checkpoint, "broken" if alone.returncode else "whole")


def test_a_load_waits_for_another_threads_import_of_transformers(tiny_checkpoint: Path) -> None:
    code = """
import importlib, torch
with ThreadPoolExecutor() as pool:
    pool.submit(importlib.import_module, "transformers")
    ours()
"""
    run(LOAD + code, tiny_checkpoint)


def test_a_break_elsewhere_in_flagembedding_does_not_matter(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(FLAG, tmp_path / "FlagEmbedding")
    for package in (".", "inference", "abc", "finetune", "finetune/embedder/encoder_only/m3"):
        (tmp_path / "FlagEmbedding" / package / "__init__.py").write_text(BROKEN)
    run(LOAD + "ours()", tiny_checkpoint, folder=tmp_path)


CLASS = "from langchain_bge_dense._engine.flag import flag_model_class as found\n"


def test_another_layout_is_imported_whole(tmp_path: Path) -> None:
    (tmp_path / "FlagEmbedding").mkdir()
    (tmp_path / "FlagEmbedding" / "__init__.py").write_text("class BGEM3FlagModel: pass\n")
    assert "FlagEmbedding.BGEM3FlagModel" in run(CLASS + "print(found())", folder=tmp_path)


@pytest.mark.parametrize(
    "new_name",
    ["from FlagEmbedding.utils.other import moved", "from .other import moved"],
)
def test_a_new_name_in_the_embedder_is_imported_whole(new_name: str, tmp_path: Path) -> None:
    package = shutil.copytree(FLAG, tmp_path / "FlagEmbedding")
    (package / "__init__.py").write_text("class BGEM3FlagModel: pass\n")
    with (package / "inference/embedder/encoder_only/m3.py").open("a") as module:
        module.write(new_name)
    assert "FlagEmbedding.BGEM3FlagModel" in run(CLASS + "print(found())", folder=tmp_path)


def test_versions_that_do_not_work_together_are_named(tmp_path: Path) -> None:
    (tmp_path / "FlagEmbedding").mkdir()
    (tmp_path / "FlagEmbedding" / "__init__.py").write_text(BROKEN)
    code = "try: found()\nexcept ImportError as error: print(error)"
    message = run(CLASS + code, folder=tmp_path)
    assert "FlagEmbedding 1." in message
    assert "and transformers 5." in message
    assert "modeling_attn_mask_utils. Install the versions that constraints.txt" in message
