"""The command line: `python -m langchain_bge_dense.chroma adopt --help`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from chromadb.errors import NotFoundError
from langchain_chroma import Chroma

from langchain_bge_dense._codes import Kind
from langchain_bge_dense._options import add_settings
from langchain_bge_dense.chroma.adopt import adopt
from langchain_bge_dense.chroma.folder import require_database
from langchain_bge_dense.chroma.store import session_at
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN = (
    "collection",
    "to",
    "name",
    "lexical",
    "colbert",
    "colbert_pooling",
    "source_max_length",
)
_PORT = 8_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: The command and its options, which `--help` lists, by default those of this process.
    """
    settings = vars(_parser().parse_args(argv))
    settings.pop("command")
    location, options = settings.pop("location"), {name: settings.pop(name) for name in _OWN}
    try:
        _adopt(BGEM3Embeddings(**settings), location, **options)
    except (NotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m langchain_bge_dense.chroma")
    commands = parser.add_subparsers(dest="command", required=True)
    words = "Make a store of a collection that plain Chroma filled, without embedding its texts."
    command = commands.add_parser("adopt", help=words, description=words)
    command.add_argument("location", help="folder of the Chroma, or URL of its server")
    command.add_argument("--collection", default="langchain", help="its name [%(default)s]")
    command.add_argument("--to", help="folder or URL for the store [the same]")
    command.add_argument("--name", help="of the store [the same]; with another the old one stays")
    command.add_argument("--lexical", action="store_true", default=None, help="add lexical weights")
    command.add_argument("--colbert", choices=get_args(Kind), help="add ColBERT codes [none]")
    command.add_argument("--colbert-pooling", type=int, default=1, help="tokens a code [1]")
    command.add_argument(
        "--source-max-length",
        type=int,
        help="tokens at which the other tool cut texts; longer ones are embedded again [none]",
    )
    model = command.add_argument_group("model", "the settings of BGEM3Embeddings")
    add_settings(model, without=["show_progress"])
    return parser


def _adopt(
    embeddings: BGEM3Embeddings,
    location: str,
    collection: str,
    to: str | None,
    name: str | None,
    **options: Any,
) -> None:
    source = None
    if to or name:
        there = _options_of(location)
        require_database(there.get("persist_directory"))
        client = session_at(**there).client
        source = Chroma(collection, client=client, create_collection_if_not_exists=False)
    options |= {"source": source, "show_progress": True, **_options_of(to or location)}
    with adopt(embeddings, name or collection, **options) as store:
        count, signals = store.passages.collection.count(), store.passages.settings.signals()
    sys.stdout.write(f"{count:,} passages with {signals or 'dense vectors alone'}.\n")


def _options_of(location: str) -> dict[str, Any]:
    """Make the options of `open_chroma` for a folder, or for the URL of a server."""
    url = urlsplit(location)
    if url.scheme not in {"http", "https"}:
        return {"persist_directory": location}
    return {"host": url.hostname, "port": url.port or _PORT, "ssl": url.scheme == "https"}


if __name__ == "__main__":
    main()
