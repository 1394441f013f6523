"""Keep a Chroma collection in step with a folder, by LangChain's `index()` and its record manager.

python examples/incremental_index.py notes/ --db db            # BAAI/bge-m3
python examples/incremental_index.py notes/ --db db --small    # a small English model

Run it again after files have changed: passages that are as they were are not embedded again, those
of changed files take the place of the old ones, and those of deleted files leave the collection.
`index_documents` of langchain_bge_dense.chroma needs no record manager, but deletes nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chromadb.errors import ChromaError
from folder_loader import FolderLoader
from langchain_classic.indexes import SQLRecordManager
from langchain_core.indexing import index
from retriever_chain import split
from terminal import complain

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import open_chroma

if TYPE_CHECKING:
    from langchain_chroma import Chroma

EXPECTED = (OSError, RuntimeError, ValueError, ImportError, ChromaError)


def update(store: Chroma, folder: Path, db: Path) -> dict[str, Any]:
    """Bring the collection up to date; gives LangChain's counts."""
    loader = FolderLoader(folder)
    passages = list(split(loader.lazy_load(), store.embeddings))
    # What was read of damaged files before stays, and so does what lies in folders that are closed.
    return index(
        [passage for passage in passages if passage.metadata["source"] not in loader.failed],
        record_manager(store, db),
        store,
        cleanup="scoped_full" if loader.failed else "full",
        source_id_key="source",
        key_encoder="sha256",
    )


def record_manager(store: Chroma, db: Path) -> SQLRecordManager:
    """Open the list of what a collection holds, which lies beside it."""
    # The collection's id: one that was deleted and made anew starts with an empty list.
    namespace = str(store._collection.id)  # noqa: SLF001
    records = SQLRecordManager(namespace, db_url=f"sqlite:///{(db / 'records.sqlite3').resolve()}")
    records.create_schema()
    return records


def run(args: argparse.Namespace) -> None:
    """Open the collection and update it."""
    if args.small:
        from small_model import build

        args.model = str(build())
    embeddings = BGEM3Embeddings(model=args.model)
    store = open_chroma(embeddings, args.collection, persist_directory=args.db)
    done = update(store, args.documents, args.db)
    counts = ("added", "updated", "skipped", "deleted")
    print(", ".join(f"{done['num_' + count]} {count}" for count in counts))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Keep a collection in step with a folder.")
    parser.add_argument("documents", type=Path, help="folder to index")
    parser.add_argument("--db", type=Path, required=True, help="folder of the database")
    parser.add_argument("--collection", default="documents", help="name of the collection")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="BAAI/bge-m3", help="hub id or folder of a checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, English only")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the example and give the exit status."""
    args = parse(arguments)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s: %(message)s")
    try:
        run(args)
    except EXPECTED as error:
        complain(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
