"""A collection that holds the passages of a folder: read, split, index, remove what is gone."""

import argparse
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from command_line import EXPECTED, find_model, say
from display import location
from folder_loader import FolderLoader
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import index_documents, open_chroma

HANDBOOK = Path(__file__).parent / "documents"

# Headings, paragraphs, sentences, lines, clauses, words, characters; Chinese has no spaces.
SENTENCE_END = r"(?<=[。！？；])|(?<=[.!?])\s"
SEPARATORS = [r"\n\n(?=#{1,6} )", r"\n\n", SENTENCE_END, r"\n", r"(?<=，)", " ", ""]
SECTION = 100_000  # characters that are split at once, so that large files show progress


def open_documents(args: argparse.Namespace, *, lexical: bool = False) -> Chroma:
    """Load the model, and bring the collection of the folder up to date."""
    say(model_note(args))
    store, folder = open_folder(args)
    if not args.db:
        say(f"Database: {default_db(store.embeddings)} (--db takes another folder)")
    say(index_folder(store, folder, lexical=lexical))
    return store


def open_folder(args: argparse.Namespace) -> tuple[Chroma, Path]:
    """Load the model, and open the collection of the folder as it is."""
    folder = Path(args.documents or HANDBOOK)
    embeddings = find_model(args).load()
    return open_collection(embeddings, args.db or default_db(embeddings), folder), folder


def model_note(args: argparse.Namespace) -> str:
    """Say which model is loaded."""
    if args.server:
        return f"The model is on {args.server}."
    if args.small:
        return "A small model, for a first look: without --small it is BAAI/bge-m3 (2.3 GB)."
    return f"Loading {args.model}."


def default_db(embeddings: BGEM3Embeddings) -> Path:
    """Name a folder of the model's own in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^\w.]+", "-", embeddings.fingerprint)
    return cache / "langchain-bge-dense" / "retriever_chain" / name


def open_collection(embeddings: BGEM3Embeddings, db: Path, folder: Path) -> Chroma:
    """Open the collection of a folder of documents; each folder has one of its own."""
    name = f"documents-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    try:
        return open_chroma(embeddings, name, persist_directory=db)
    except EXPECTED as error:
        msg = f"{db} cannot be used; give another folder with --db. {error}"
        raise ValueError(msg) from error


def index_folder(store: Chroma, folder: Path, *, lexical: bool = False) -> str:
    """Bring a collection up to date with a folder, and say in a line what that took."""
    loader = FolderLoader(folder, show_progress=True)
    passages = list(split(loader.lazy_load(), store.embeddings))  # their number tells how far it is
    current = {key(passage.page_content, passage.metadata) for passage in passages}
    result = index_documents(store, passages, show_progress=True, lexical=lexical or None)
    removed = remove_stale(store, current, loader.failed)
    return f"{folder}: {len(current)} passages, {result.added} new, {removed} removed"


def split(documents: Iterable[Document], embeddings: BGEM3Embeddings) -> Iterator[Document]:
    """Cut documents into passages of at most 150 of the model's own tokens."""
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=150,
        chunk_overlap=20,
        length_function=embeddings.count_tokens,
        separators=SEPARATORS,
        is_separator_regex=True,
    )
    for document in documents:
        if len(document.page_content) > SECTION:
            say(f"Splitting {location(document)}: {len(document.page_content):,} characters.")
        # No blank line, and so no cut, between a heading and what it is the heading of.
        text = re.sub(r"^(#{1,6} .*)\n+", r"\1\n", document.page_content, flags=re.MULTILINE)
        for section in sections(text):
            yield from splitter.create_documents([section], [document.metadata])


def sections(text: str) -> Iterator[str]:
    """Cut a large text at paragraphs, or else at lines or words."""
    start = 0
    while start < len(text):
        end = start + SECTION
        if end < len(text):
            ends = (text.rfind(gap, start, end) for gap in ("\n\n", "\n", " "))
            end = next((found for found in ends if found > start), end)
        yield text[start:end]
        start = end


def key(text: str, metadata: dict[str, Any]) -> tuple[str, frozenset[tuple[str, Any]]]:
    """Give what tells one passage from another."""
    return text, frozenset(metadata.items())


def remove_stale(store: Chroma, current: set[Any], unreadable: Iterable[str]) -> int:
    """Delete passages that are gone from the folder; those of unreadable files stay."""
    stored = store.get(include=["documents", "metadatas"])
    rows = zip(stored["ids"], stored["documents"], stored["metadatas"], strict=True)
    stale = [
        id_
        for id_, text, metadata in rows
        if key(text, metadata) not in current
        and not any(f"{metadata['source']}/".startswith(f"{path}/") for path in unreadable)
    ]
    if stale:
        store.delete(stale)
    return len(stale)
