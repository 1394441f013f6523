"""Needs the extras demo and ray: in a clone, pip install ".[demo,ray]".

Embed a folder of Parquet or JSONL on a Ray cluster, and load the vectors into a Chroma server.

chroma run --path db                                                 # the server
python examples/ray_index.py passages/ --vectors vectors/            # BAAI/bge-m3
python examples/ray_index.py passages/ --vectors vectors/ --small    # a small model

Vectors are kept as Parquet beside the other columns. Files whose vectors are there are not embedded
again, and rows that the collection has are not sent again: after a crash, run the same command.
Ray starts on this machine, or takes the cluster of RAY_ADDRESS, which has to see both folders.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs  # noqa: F401 - says what is missing

import numpy as np
import pyarrow.parquet as pq
import ray
from command_line import exit_status, find_model, model_options, say
from langchain_core.documents import Document
from langchain_core.utils.iter import batch_iterate
from ray.data import Dataset
from ray.exceptions import RayError

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import index_vectors, open_chroma
from langchain_bge_dense.ray import embed_dataset

READERS = {".parquet": ray.data.read_parquet, ".jsonl": ray.data.read_json}
FILES_PER_JOB = 1_000  # what a crash costs at most
INPUTS, FINGERPRINT = "inputs.txt", "fingerprint.txt"


def embed_folder(args: argparse.Namespace, embeddings: BGEM3Embeddings) -> None:
    """Compute the vectors that are missing, some files at a time."""
    check_model(args.vectors, embeddings.fingerprint)
    for files in batch_iterate(FILES_PER_JOB, pending(args.documents, args.vectors)):
        say(f"Embedding {len(files)} files.")
        datasets = [
            read([str(file) for file in files if file.suffix == suffix])
            for suffix, read in READERS.items()
            if any(file.suffix == suffix for file in files)
        ]
        embedded = embed_dataset(
            functools.reduce(Dataset.union, datasets),
            embeddings,
            text_column=args.text_column,
            concurrency=args.concurrency,
        )
        part = args.vectors / f"{len(parts(args.vectors)):05}"
        unfinished = part.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        embedded.write_parquet(str(unfinished))
        (unfinished / INPUTS).write_text("".join(f"{stamp(file)}\n" for file in files))
        unfinished.rename(part)


def check_model(vectors: Path, fingerprint: str) -> None:
    """Keep the vectors of one model in one folder."""
    vectors.mkdir(parents=True, exist_ok=True)
    file = vectors / FINGERPRINT
    if not file.exists():
        file.write_text(fingerprint)
    if file.read_text() != fingerprint:
        msg = f"{vectors} holds vectors of {file.read_text()}. Give another folder with --vectors."
        raise ValueError(msg)


def parts(vectors: Path) -> list[Path]:
    """Folders of finished jobs, in their order."""
    return sorted(file.parent for file in vectors.glob(f"?????/{INPUTS}"))


def stamp(file: Path) -> str:
    """Name a file, and what changes with its content."""
    found = file.stat()
    return f"{file.name}\t{found.st_size}\t{found.st_mtime_ns}"


def pending(documents: Path, vectors: Path) -> list[Path]:
    """List files without vectors; one that has changed since it got them is an error."""
    files = sorted(file for file in documents.glob("*") if file.suffix in READERS)
    if not files:
        msg = f"There is no file to read in {documents}. Put {' or '.join(READERS)} files there."
        raise ValueError(msg)
    done = {line for part in parts(vectors) for line in (part / INPUTS).read_text().splitlines()}
    names = {line.split("\t")[0] for line in done}
    todo = [file for file in files if stamp(file) not in done]
    if changed := [file for file in todo if file.name in names]:
        msg = (
            f"{changed[0]} has changed since its vectors were computed. "
            "Put new rows into a new file, or take a new folder with --vectors."
        )
        raise ValueError(msg)
    return todo


def rows(vectors: Path, text_column: str) -> Iterator[tuple[Document, np.ndarray[Any, Any]]]:
    """Read documents with their vectors; rows that got none are reported and left out."""
    for file in (file for part in parts(vectors) for file in sorted(part.glob("*.parquet"))):
        for batch in pq.ParquetFile(file).iter_batches(1_000):
            good = batch.filter(batch.column("error").is_null())
            if reasons := batch.column("error").drop_null().to_pylist():
                say(f"Rows without a vector: {len(reasons)}. {' '.join(sorted(set(reasons)))}")
            numbers = good.column("vector").flatten().to_numpy().reshape(len(good), -1)  # (N, D)
            others = good.drop_columns(["vector", "error"]).to_pylist()
            for row, vector in zip(others, numbers, strict=True):
                yield Document(row.pop(text_column), metadata=row), vector


def run(args: argparse.Namespace) -> None:
    """Embed what is new, and store what the collection lacks."""
    embeddings = find_model(args)
    store = open_chroma(embeddings, args.collection, host=args.host, port=args.port)
    embed_folder(args, embeddings)
    embedded = rows(args.vectors, args.text_column)
    done = index_vectors(store, embedded, fingerprint=embeddings.fingerprint, show_progress=True)
    print(f"{done.added} passages added, {done.skipped} were there.")


def main(arguments: list[str] | None = None) -> int:
    parser = model_options("Embed a folder of tables into a Chroma server.")
    parser.add_argument("documents", type=Path, help="folder of .parquet and .jsonl files")
    parser.add_argument("--vectors", type=Path, required=True, help="folder for the vectors")
    parser.add_argument("--text-column", default="text", help="column with the texts")
    parser.add_argument("--collection", default="passages", help="name in the Chroma server")
    parser.add_argument("--host", default="localhost", help="of the Chroma server")
    parser.add_argument("--port", type=int, default=8000, help="of the Chroma server")
    parser.add_argument("--concurrency", type=int, help="models at once (default: one per GPU)")
    return exit_status(run, parser.parse_args(arguments), RayError)


if __name__ == "__main__":
    sys.exit(main())
