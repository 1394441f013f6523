"""Options, prompt and errors that the examples share. Knows no model and no documents."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chromadb.errors import ChromaError
from terminal import complain, read_line, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What goes wrong without a mistake in a program: no model, no network, a folder in use...
EXPECTED = (OSError, RuntimeError, ValueError, ImportError, ChromaError)


def options(description: str, k: int = 4) -> argparse.ArgumentParser:
    """Give a parser that knows the model, the documents, the database and the question."""
    parser = argparse.ArgumentParser(description=description)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="BAAI/bge-m3", help="hub id or folder of a checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, English only")
    parser.add_argument("--documents", type=Path, help="folder to search (default: the handbook)")
    parser.add_argument("--db", type=Path, help="folder of the database (default: in the cache)")
    parser.add_argument("-k", type=int, default=k, help=f"passages per question (default: {k})")
    parser.add_argument("--query", help="one question (default: a prompt)")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning"])
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be answered before anything is loaded."""
    if args.k < 1:
        msg = f"-k is {args.k}. Ask for at least one passage."
        raise ValueError(msg)
    if args.query is not None and not args.query.strip():
        msg = "The question is empty. Give --query some words, or leave it out for a prompt."
        raise ValueError(msg)


def ask(answer: Callable[[str], None], query: str | None, questions: Iterable[str]) -> None:
    """Answer one question, all that are asked on a terminal, or else the built-in ones."""
    questions = tuple(questions)
    if query is None and sys.stdin.isatty():
        converse(answer, questions[0])
        return
    for question in questions if query is None else [query]:
        print(f"> {question}")
        answer(question)


def converse(answer: Callable[[str], None], example: str) -> None:
    """Answer questions until an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its history and arrow keys
    print(f'Ask a question, such as "{example}" An empty line ends it.')
    while question := read_line():
        answer_or_complain(answer, question)


def answer_or_complain(answer: Callable[[str], None], question: str) -> None:
    """Answer; what goes wrong with one question does not end the conversation."""
    try:
        answer(question)
    except EXPECTED as error:
        complain(error)


def exit_status(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run an example; what can be expected to go wrong is said in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every terminal knows Chinese
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s: %(message)s")
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        run(args)
    except KeyboardInterrupt:
        say("\nStopped; what has been indexed is kept.")
        return 130
    except EXPECTED as error:
        complain(error)
        return 2
    return 0
