"""The signals of BGE-M3 side by side: dense, lexical, both, and with ColBERT, for one query.

python examples/hybrid_search.py                                # the handbook, at a prompt
python examples/hybrid_search.py --query "Which shelf is VS-2208-K on?" --html page.html
python examples/hybrid_search.py --small                        # a small English model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from command_line import ask, check, exit_status, options
from hybrid_page import write_page
from hybrid_terminal import show
from matches import Answer, Column, Explainer
from retriever_chain import open_documents
from terminal import say

from langchain_bge_dense import BGEM3Retriever

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from langchain_chroma import Chroma

QUESTIONS = (
    "What did Cormack, Clarke and Büttcher find?",
    "Why is DB-0090-L left-handed?",
    "What is Liu's warning about long contexts?",
    "What stops a tap from dripping?",
)


class Signal(NamedTuple):
    """A column: how the retriever is set, and which of its scores tells the order."""

    name: str
    note: str
    settings: dict[str, Any]
    score: str


SIGNALS = (
    Signal("Dense", "closeness in meaning", {"weights": (1, 0, 0)}, "dense_score"),
    Signal("Lexical", "words in common", {"weights": (0, 1, 0)}, "lexical_score"),
    Signal("Fused", "dense and lexical", {}, "relevance_score"),
    Signal("With ColBERT", "and token by token", {"colbert": True}, "relevance_score"),
)
FUSED = 2
EXPLAINED = 3


def search(store: Chroma, explainer: Explainer, query: str, k: int) -> Answer:
    """Search by each signal, and explain the best passages of both together."""
    columns = [Column(s.name, s.note, s.score, ranking(store, s, query, k)) for s in SIGNALS]
    words = explainer.words(query)
    best = columns[FUSED].passages[:EXPLAINED]
    return Answer(query, columns, words, explainer.matches(words, best))


def ranking(store: Chroma, signal: Signal, query: str, k: int) -> list[Any]:
    """Give the passages of one column; those that share no word are no lexical matches."""
    found = BGEM3Retriever(vectorstore=store, k=k, **signal.settings).invoke(query)
    if signal.score != "lexical_score":
        return found
    return [passage for passage in found if passage.metadata[signal.score] > 0]


def answerer(store: Chroma, args: argparse.Namespace) -> Callable[[str], None]:
    """Give the function that answers a question on the terminal and, if asked, on a page."""
    explainer = Explainer(store.embeddings)
    answers: list[Answer] = []
    model = "a small English model for demonstrations, not BGE-M3" if args.small else args.model

    def answer(query: str) -> None:
        answers.append(search(store, explainer, query, args.k))
        show(answers[-1])
        if args.html:
            write_page(args.html, answers, model)

    return answer


def check_page(path: Path | None) -> None:
    """Refuse a page that could not be written, before anything is loaded."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
        msg = f"--html {path} {what}. Name a file in a folder that exists."
        raise ValueError(msg)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = options("Show the signals of hybrid search side by side.", k=5)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Index the folder, then answer one question, the built-in ones, or all that are asked."""
    check(args)
    check_page(args.html)
    store = open_documents(args, lexical=True)
    ask(answerer(store, args), args.query, QUESTIONS)
    if args.html and args.html.exists():
        say(f"The page is in {args.html}.")


def main(arguments: list[str] | None = None) -> int:
    """Run the example and give the exit status."""
    return exit_status(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
