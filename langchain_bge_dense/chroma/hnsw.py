"""The files of one vector index of a local Chroma: whether they are whole, and their repair.

Chroma persists an index in place: header, changed elements of level 0, changed links of the upper
levels, then a pickle of ids. The first and the last two are small, and a backup holds them. Level 0
holds the vectors, is large, and needs no backup: all that an unfinished write can do there is to
link elements to others that the old header does not count. Such links are removed.

When Chroma makes an index, it writes the memory that it has reserved for the first elements as it
is: with what was there before, texts and vectors of anything among it. That is cut off.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HEADER, LEVEL_0, UPPER_LEVELS = "header.bin", "data_level0.bin", "link_lists.bin"
LENGTHS = "length.bin"  # of the vectors, a float32 each
IDS = "index_metadata.pickle"
_VERSION = 1
_HEADER = struct.Struct("<i6QiI3QdQ")


class Header(NamedTuple):
    """First file of an index; sizes in bytes."""

    version: int
    links_offset: int
    capacity: int
    elements: int
    element_size: int
    label_offset: int
    vector_offset: int
    max_level: int
    entry_point: int
    max_links: int
    max_links_level_0: int
    m: int
    level_factor: float
    ef_construction: int

    @classmethod
    def read(cls, folder: Path) -> Header:
        """Read the header in a folder."""
        content = (folder / HEADER).read_bytes()
        if len(content) < _HEADER.size or content[:4] != struct.pack("<i", _VERSION):
            msg = f"{HEADER} has {len(content)} bytes and starts with {content[:4]!r}"
            raise ValueError(msg)
        return cls._make(_HEADER.unpack_from(content))

    def layout(self) -> np.dtype[Any]:
        """Describe an element of level 0."""
        return np.dtype(
            {
                "names": ["count", "deleted", "links", "label"],
                "formats": ["<u2", "u1", ("<u4", (self.max_links_level_0,)), "<u8"],
                "offsets": [0, 2, 4, self.label_offset],
                "itemsize": self.element_size,
            }
        )


def damage(folder: Path) -> str | None:
    """Say how the files of an index that Chroma has persisted are damaged, if they are."""
    missing = [
        name for name in (HEADER, LEVEL_0, UPPER_LEVELS, IDS) if not (folder / name).exists()
    ]
    if missing:
        return f"{', '.join(missing)} is missing"
    try:
        header = Header.read(folder)
    except ValueError as error:
        return str(error)
    whole = (folder / LEVEL_0).stat().st_size // header.element_size
    if whole < header.elements:
        return f"{LEVEL_0} holds {whole:,} of {header.elements:,} vectors"
    if not _has_links(folder / UPPER_LEVELS, header.elements):
        return f"{UPPER_LEVELS} is cut short"
    if not _ends_with(folder / IDS, pickle.STOP):
        return f"{IDS} is cut short"
    return None


def back_up(index: Path, backup: Path, *, loaded: bool) -> None:
    """Copy what cannot be repaired before Chroma persists an index.

    The pickle of a loaded index is moved: Chroma does not read it again, and writes it anew.
    """
    unfinished = backup.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    persisted = (index / IDS).exists()
    copied = (HEADER, UPPER_LEVELS) if loaded else (HEADER, UPPER_LEVELS, IDS)
    for name in copied if persisted else ():
        shutil.copyfile(index / name, unfinished / name)
    unfinished.rename(backup)
    if persisted and loaded:
        (index / IDS).replace(backup / IDS)


def drop_backup(index: Path, backup: Path) -> None:
    """Remove a backup once the index is persisted."""
    if (backup / IDS).exists() and not (index / IDS).exists():
        (backup / IDS).replace(index / IDS)  # Chroma found nothing to persist
    shutil.rmtree(backup)


def restore(index: Path, backup: Path) -> None:
    """Restore an index from its backup. A killed restore can be repeated."""
    if not (backup / HEADER).exists():  # of an index that had not been persisted before
        shutil.rmtree(index, ignore_errors=True)
    else:
        ids = backup if (backup / IDS).exists() else index
        _repair(index / LEVEL_0, Header.read(backup), _labels(ids / IDS))
        for name in (HEADER, UPPER_LEVELS):
            shutil.copyfile(backup / name, index / f"{name}.new")
            (index / f"{name}.new").replace(index / name)
        (ids / IDS).replace(index / IDS)
    shutil.rmtree(backup)


def trim(index: Path) -> None:
    """Cut the files of an index to its elements. Damaged ones stay as they are.

    The index is of cosine distance: for others Chroma writes lengths that it has not set.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        header = Header.read(index)
        for name, size in ((LEVEL_0, header.element_size), (LENGTHS, 4)):
            if (index / name).stat().st_size > header.elements * size:
                os.truncate(index / name, header.elements * size)


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, numbers and strings alone: a folder may be somebody else's."""

    def find_class(self, module: str, name: str) -> Any:
        msg = f"{IDS} names {module}.{name}"
        raise pickle.UnpicklingError(msg)


def _labels(file: Path) -> NDArray[np.uint64]:
    """Read the labels of the vectors that are not deleted."""
    with file.open("rb") as stream:
        content = _PlainUnpickler(stream).load()
    return np.fromiter(content["label_to_id"], np.uint64)


def _repair(file: Path, header: Header, labels: NDArray[np.uint64]) -> None:
    """Cut level 0 to the header's elements, and make all of them reachable."""
    if not header.elements:
        return
    elements = np.memmap(file, header.layout(), "r+", header.links_offset, (header.elements,))
    deleted = ~np.isin(elements["label"], labels)  # (N,)
    elements["deleted"][deleted != (elements["deleted"] & 1)] ^= 1
    stored = np.array(elements["links"])  # (N, L)
    links = stored.copy()
    valid = np.arange(links.shape[1]) < elements["count"][:, None]  # (N, L)
    valid &= links < header.elements
    counts = valid.sum(axis=1)  # (N,)
    broken = np.flatnonzero(counts != elements["count"])
    order = np.argsort(~valid[broken], axis=1, kind="stable")  # valid links first
    links[broken] = np.take_along_axis(links[broken], order, axis=1)
    _connect(links, counts, header.entry_point)
    changed = (links != stored).any(axis=1) | (counts != elements["count"])  # (N,)
    elements["links"][changed] = links[changed]
    elements["count"][changed] = counts[changed]


def _connect(links: NDArray[np.uint32], counts: NDArray[np.int64], entry: int) -> None:
    """Link unreachable elements from one of their own neighbours."""
    for element in np.flatnonzero(~_reached(links, counts, entry)).tolist():
        neighbours = links[element, : counts[element]].tolist() or [entry]
        neighbour = min(neighbours, key=counts.__getitem__)
        slot = min(int(counts[neighbour]), links.shape[1] - 1)
        links[neighbour, slot] = element
        counts[neighbour] = slot + 1


def _reached(links: NDArray[np.uint32], counts: NDArray[np.int64], entry: int) -> NDArray[np.bool_]:
    """Tell which elements links from the entry point reach, `(N,)`."""
    reached = np.zeros(len(links), np.bool_)  # (N,)
    front = np.array([entry])
    while len(front):
        reached[front] = True
        valid = np.arange(links.shape[1]) < counts[front, None]  # (F, L)
        linked = np.zeros(len(links), np.bool_)  # (N,)
        linked[links[front][valid]] = True
        front = np.flatnonzero(linked & ~reached)
    return reached


def _has_links(file: Path, count: int) -> bool:
    """Check that a file holds, for each element, the size of its links in bytes and the links."""
    content, offset = file.read_bytes(), 0
    for _ in range(count):
        offset += 4 + int.from_bytes(content[offset : offset + 4], "little")
    return offset <= len(content)


def _ends_with(file: Path, suffix: bytes) -> bool:
    if file.stat().st_size < len(suffix):
        return False
    with file.open("rb") as stream:
        stream.seek(-len(suffix), os.SEEK_END)
        return stream.read() == suffix
