"""Indexes documents into Chroma as a process of its own, to be killed.

    python indexing_process.py '{"persist_directory": "db"}' 1000 [die] [from=0]

Prints the position of each document that it reads, how many it embeds, and the counts when it is
done. With `die` it kills itself where Chroma persists its vector index for the second time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hashed_embeddings import HashedEmbeddings
from inside import plain
from langchain_core.documents import Document

from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH = 40


def telling(embed: Callable[[list[str]], list[list[float]]]) -> Callable:
    """The same function, but it says how many texts it embeds."""

    def embed_and_tell(texts: list[str]) -> list[list[float]]:
        sys.stdout.write(f"embeds {len(texts)}\n")
        sys.stdout.flush()
        return embed(texts)

    return embed_and_tell


def documents(count: int, first: int = 0) -> Iterator[Document]:
    for number in range(first, count):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        yield Document(f"passage {number}", metadata={"number": number, "tags": ["a", "b"]})


def die_persisting(store, folder: Path) -> None:
    """Leave what a killed Chroma leaves when it persists its index for the second time.

    Header and links are the new ones, level 0 is new up to some byte and old from there, the ids
    are cut short, and SQLite does not know of it.
    """
    upsert = plain(store).upsert

    def upsert_and_die(**columns) -> None:
        [*backup] = folder.glob("*.backup/header.bin")
        if not backup:
            upsert(**columns)
            return
        index = folder / backup[0].parent.name.partition(".")[0]
        database = (folder / "chroma.sqlite3").read_bytes()
        before = (index / "data_level0.bin").read_bytes()
        upsert(**columns)
        after = (index / "data_level0.bin").read_bytes()
        torn = len(before) // 2 + 50
        (index / "data_level0.bin").write_bytes(after[:torn] + before[torn:])
        ids = index / "index_metadata.pickle"
        ids.write_bytes(ids.read_bytes()[: ids.stat().st_size // 2])
        (folder / "chroma.sqlite3").write_bytes(database)
        os.kill(os.getpid(), signal.SIGKILL)

    plain(store).upsert = upsert_and_die


def main(place: dict, count: int, *options: str) -> None:
    embeddings = HashedEmbeddings()
    embeddings.embed_documents = telling(embeddings.embed_documents)
    first = max(int(option[5:]) for option in ("from=0", *options) if option.startswith("from="))
    store = open_chroma(embeddings, "passages", **place)
    if "die" in options:
        die_persisting(store, Path(place["persist_directory"]))
    done = index_documents(store, documents(count, first), batch_size=BATCH)
    sys.stdout.write(f"{done} {embeddings.embedded}\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
