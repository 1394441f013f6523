"""Indexes into a real file system that fills up again and again, as a process with its own mounts.

    unshare --map-root-user --mount python full_disk_process.py MOUNT_POINT COUNT COPY

Mounts a small file system in memory and indexes until it is full, makes it a little larger, opens
the collection and indexes on, until all is stored. Then copies the folder to where it outlives the
mount. Prints, as JSON, the last line of each attempt and what could be read after it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("indexing_process.py")
STORED = """
import sys
from hashed_embeddings import HashedEmbeddings
from langchain_bge_dense.chroma import open_chroma
store = open_chroma(HashedEmbeddings(), "passages", persist_directory=sys.argv[1])
print(len(store.get()["ids"]))
"""
FIRST, STEP, LAST = 1_000, 900, 20_000  # KiB


def run(*command: object) -> list[str]:
    """Lines of a process, its errors last."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return (ended.stdout + ended.stderr).splitlines()


def mount(folder: Path, kibibytes: int, *options: str) -> None:
    named = ",".join((f"size={kibibytes}k", *options))
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", named, "tmpfs", folder], check=True)


def main(folder: Path, count: str, copy: Path) -> None:
    indexing = (sys.executable, SCRIPT, json.dumps({"persist_directory": str(folder)}), count)
    mount(folder, FIRST)
    attempts, stored = [], []
    for size in range(FIRST, LAST, STEP):
        attempts += run(*indexing)[-1:]
        if attempts[-1].startswith("IndexResult"):
            break
        mount(folder, size + STEP, "remount")
        stored += run(sys.executable, "-c", STORED, folder)[-1:]
    shutil.copytree(folder, copy)
    sys.stdout.write(json.dumps({"attempts": attempts, "stored": stored}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
