"""What the examples share: options, the model, notes on a terminal, the prompt, and errors."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chromadb.errors import ChromaError
from display import console, plain, wrap
from rich.text import Text
from tqdm import tqdm

from langchain_bge_dense import BGEM3Embeddings

logger = logging.getLogger(__name__)

# What goes wrong without a mistake in a program: no model, no network, a folder in use...
EXPECTED = (OSError, RuntimeError, ValueError, ImportError, ChromaError)


def model_options(description: str) -> argparse.ArgumentParser:
    """Make a parser for the model and what to log."""
    parser = argparse.ArgumentParser(description=description)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="BAAI/bge-m3", help="hub id or folder of a checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, for a first look")
    model.add_argument("--server", help="URL of langchain_bge_dense.serve, which has the model")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning"])
    return parser


def search_options(description: str, k: int = 4) -> argparse.ArgumentParser:
    """Make a parser for the model, the documents and the database."""
    parser = model_options(description)
    parser.add_argument("--documents", type=Path, help="folder to search (default: the handbook)")
    parser.add_argument("--db", type=Path, help="folder of the database (default: in the cache)")
    parser.add_argument("-k", type=int, default=k, help=f"passages per question (default: {k})")
    parser.set_defaults(query=None)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be answered before anything is loaded."""
    if args.k < 1:
        msg = f"-k is {args.k}. Ask for at least one passage."
        raise ValueError(msg)
    if args.query is not None and not args.query.strip():
        msg = "The question is empty. Give --query some words, or leave it out for a prompt."
        raise ValueError(msg)


def find_model(args: argparse.Namespace) -> BGEM3Embeddings:
    """Find the model that the options name; it is loaded with the first text."""
    if args.small:
        from small_model import build

        return BGEM3Embeddings(model=str(build()))
    if args.server:
        return BGEM3Embeddings(base_url=args.server, api_key=os.environ.get("BGE_M3_API_KEY"))
    embeddings = BGEM3Embeddings(model=args.model)
    try:
        _ = embeddings.dimension  # reads what is here, or downloads it
    except (OSError, ValueError) as error:
        msg = f"{error} Or try --small, which needs no download."
        raise ValueError(msg) from error
    return embeddings


def ask(answer: Callable[[str], None], query: str | None, questions: Sequence[str]) -> None:
    """Answer one question, all that are asked on a terminal, or else the built-in ones."""
    if query is None and sys.stdin.isatty():
        converse(answer, questions[0])
        return
    for question in questions if query is None else [query]:
        print(f"> {question}")
        answer(question)


def converse(answer: Callable[[str], None], example: str) -> None:
    """Answer questions until an empty line, Ctrl-D or Ctrl-C; errors do not end it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its history and arrow keys
    say(f'Ask a question, such as "{example}" An empty line ends it.')
    while question := read_line():
        try:
            answer(question)
        except EXPECTED as error:  # noqa: PERF203
            complain(error)


def read_line() -> str:
    """Read a line from the prompt; an empty one at Ctrl-D and Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def say(line: str) -> None:
    """Print a note about what is going on, apart from the results."""
    out = console(stderr=True)
    text = Text(plain(line))
    with tqdm.external_write_mode(sys.stderr):  # a progress bar makes way
        out.print(*(wrap(text, out.width) if out.is_terminal else [text]), sep="\n", soft_wrap=True)


def complain(error: BaseException) -> None:
    """Say what went wrong in one line; --log-level debug adds where."""
    logger.debug("Where it happened:", exc_info=error)
    say(f"Error: {error}")


class NoteHandler(logging.Handler):
    """Logs as notes are printed."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            say(line)


def exit_status(
    run: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    *expected: type[Exception],
) -> int:
    """Run an example; what can be `EXPECTED` to go wrong, or is named, is said in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every terminal knows Chinese
    form = "%(levelname)s: %(message)s"
    logging.basicConfig(level=args.log_level.upper(), format=form, handlers=[NoteHandler()])
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        run(args)
    except KeyboardInterrupt:
        say("Stopped; what has been indexed is kept.")
        return 130
    except (*EXPECTED, *expected) as error:
        complain(error)
        return 2
    return 0
