"""Needs the extra demo: in a clone, pip install ".[demo]".

Keep a Chroma collection in step with a folder, by LangChain's `index()` and its record manager.

python examples/incremental_index.py notes/ --db db            # BAAI/bge-m3
python examples/incremental_index.py notes/ --db db --small    # a small model

Run it again after files have changed: passages that are as they were are not embedded again, those
of changed files take the place of the old ones, and those of deleted files leave the collection.
The lexical weights of hybrid search are kept in step too. `index_documents` of
langchain_bge_dense.chroma needs no record manager, but deletes nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import needs  # noqa: F401 - says what is missing

from command_line import exit_status, find_model, model_options
from folder_index import split
from folder_loader import FolderLoader
from langchain_classic.indexes import SQLRecordManager
from langchain_core.indexing import index

from langchain_bge_dense.chroma import BGEM3Chroma, open_chroma


def update(store: BGEM3Chroma, folder: Path, db: Path) -> dict[str, Any]:
    """Bring the collection up to date; gives LangChain's counts."""
    loader = FolderLoader(folder)
    passages = list(split(loader.lazy_load(), store.embeddings))
    # A collection that was deleted and made anew has another uid, and starts with an empty list.
    records = SQLRecordManager(store.uid, db_url=f"sqlite:///{(db / 'records.sqlite3').resolve()}")
    records.create_schema()
    # What was read of damaged files before stays, and so does what lies in folders that are closed.
    return index(
        [passage for passage in passages if passage.metadata["source"] not in loader.failed],
        records,
        store,
        cleanup="scoped_full" if loader.failed else "full",
        source_id_key="source",
        key_encoder="sha256",
    )


def run(args: argparse.Namespace) -> None:
    """Open the collection and update it."""
    store = open_chroma(find_model(args), args.collection, persist_directory=args.db, lexical=True)
    done = update(store, args.documents, args.db)
    counts = ("added", "updated", "skipped", "deleted")
    print(", ".join(f"{done['num_' + count]} {count}" for count in counts))


def main(arguments: list[str] | None = None) -> int:
    parser = model_options("Keep a collection in step with a folder.")
    parser.add_argument("documents", type=Path, help="folder to index")
    parser.add_argument("--db", type=Path, required=True, help="folder of the database")
    parser.add_argument("--collection", default="documents", help="name of the collection")
    return exit_status(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
