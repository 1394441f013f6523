"""Needs the extra demo: in a clone, pip install ".[demo]".

The signals of BGE-M3 side by side: dense, lexical, both, and with ColBERT, for one query.

python examples/hybrid_search.py                                # the handbook, at a prompt
python examples/hybrid_search.py --query "Which shelf is VS-2208-K on?" --html page.html
python examples/hybrid_search.py --small                        # a small model
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import needs  # noqa: F401 - says what is missing

from answered import NOTHING, seems_answered
from command_line import ask, check, exit_status, say, search_options
from display import LINES, console, fit, location, printable, quoted, readable, wrap, write
from folder_index import open_documents
from jinja2 import Environment
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.utils.iter import batch_iterate
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.matches import Mark, Match, Matches, Word, find_matches

PAGE = Path(__file__).with_name("hybrid_page.html")
WIDEST, NARROWEST, GAP = 140, 23, 2  # cells: all columns, one, and between two
VISIBLE = 0.005  # the smallest weight that two decimals show

QUESTIONS = (
    "What did Cormack, Clarke and Büttcher find?",
    "Why is DB-0090-L left-handed?",
    "What is Liu's warning about long contexts?",
    "What stops a tap from dripping?",
    "HX-0417-R 用哪种保险丝？",
    "ColBERT 需要多少空间？",
)


class Signal(NamedTuple):
    """A column: how the retriever is set, and which of its scores tells the order."""

    name: str
    note: str
    settings: dict[str, Any]
    score: str


SIGNALS = (
    Signal("Dense", "closeness in meaning", {"weights": (1, 0, 0)}, "bge_m3_dense_score"),
    Signal("Lexical", "words in common", {"weights": (0, 1, 0)}, "bge_m3_lexical_score"),
    Signal("Fused", "dense and lexical", {}, "bge_m3_fused_score"),
    Signal("With ColBERT", "and token by token", {"colbert": True}, "bge_m3_fused_score"),
)
FUSED, EXPLAINED = 2, 3  # the column whose best passages are explained, and how many


@dataclass(frozen=True)
class Answer:
    """The passages of each signal for a query, and why the best fused ones matched."""

    query: str
    columns: list[tuple[Signal, list[Document]]]
    matches: Matches
    note: str

    @property
    def explained(self) -> list[Document]:
        """The passages that are explained."""
        return [match.document for match in self.matches.passages]

    @cached_property
    def letters(self) -> dict[str | None, str]:
        """A letter for each passage by its id; those that are explained come first."""
        found = [passage for _, passages in self.columns for passage in passages]
        ids = dict.fromkeys(passage.id for passage in self.explained + found)
        return {id_: lettered(number) for number, id_ in enumerate(ids)}

    def labels(self) -> list[str]:
        """Names of the explained passages."""
        return [f"{self.letters[passage.id]}  {location(passage)}" for passage in self.explained]


def lettered(number: int) -> str:
    """Count with letters."""
    more, last = divmod(number, 26)
    return (lettered(more - 1) if more else "") + chr(ord("A") + last)


def search(store: Chroma, query: str, k: int) -> Answer:
    """Search by each signal, and explain the best passages of both together."""
    columns = [(signal, ranking(store, signal, query, k)) for signal in SIGNALS]
    _, best = columns[FUSED]
    passages = [passage for _, column in columns for passage in column]
    answered = not passages or seems_answered(query, passages, store.embeddings.fingerprint)
    matches = find_matches(store.embeddings, query, best[:EXPLAINED])
    return Answer(query, columns, matches, "" if answered else NOTHING)


def ranking(store: Chroma, signal: Signal, query: str, k: int) -> list[Document]:
    """Give the passages of one column; those that share no word are no lexical matches."""
    found = BGEM3Retriever(vectorstore=store, k=k, scores=True, **signal.settings).invoke(query)
    if signal.score != "bge_m3_lexical_score":
        return found
    return [passage for passage in found if passage.metadata[signal.score] > 0]


def show(answer: Answer) -> None:
    """Print the columns, the query's words with their weights, and the best passages."""
    table(answer, console(widest=WIDEST))
    out = console()
    if answer.note:
        write(out, answer.note)
        out.print()
    write(out, Text("Why: lexical weights of the query's tokens", "bold"))
    words = dict.fromkeys(weighed(word) for word in answer.matches.words if word.weight >= VISIBLE)
    write(out, ", ".join(words), indent=2, lines=LINES)
    for match in answer.matches.passages:
        out.print()
        show_match(out, match, answer)
    out.print()


def table(answer: Answer, out: Console) -> None:
    """Lay the columns out side by side: four, two or one, as the width allows."""
    abreast = next(n for n in (4, 2, 1) if n == 1 or (out.width + GAP) // n >= NARROWEST + GAP)
    width = (out.width + GAP) // abreast - GAP
    for signals in batch_iterate(abreast, answer.columns):
        grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for _ in signals:
            grid.add_column(width=width, no_wrap=True)
        grid.add_row(*(column(*each, answer, width) for each in signals))
        out.print()
        out.print(grid)
    out.print()


def column(signal: Signal, passages: Sequence[Document], answer: Answer, width: int) -> Group:
    """Write a column down: its name, what it goes by, its ranking."""
    lines = [Text(signal.name.upper(), "bold"), Text(signal.note, "dim")]
    for passage in passages:
        head = f"{answer.letters[passage.id]} {passage.metadata[signal.score]:5.2f} "
        lines.append(Text(head + fit(location(passage), width - len(head)).rstrip()))
    return Group(*lines) if passages else Group(*lines, Text("no passage"))


def weighed(word: Word) -> str:
    """Write a word down with its weight, or with those of the tokens that it is made of."""
    if len(word.tokens) == 1:
        return f"{quoted(word.text)} {word.weight:.2f}"
    tokens = " + ".join(f"{quoted(text)} {weight:.2f}" for _, text, weight in word.tokens)
    return f"{quoted(word.text)} = {tokens}"


def show_match(out: Console, match: Match, answer: Answer) -> None:
    """Print a passage's location and scores, what its words add, and its best lines with marks."""
    passage = match.document
    dense = f" · dense {passage.metadata['bge_m3_dense_score']:.2f}"
    write(out, Text(f"{answer.letters[passage.id]} {location(passage)}{dense}", "bold"))
    words = [
        f"{quoted(text)} {score:.2f}" for text, score in match.words.items() if score >= VISIBLE
    ]
    total = f"lexical {match.lexical_score:.2f} = {' + '.join(words) or 'no word in common'}"
    write(out, total, indent=2, lines=LINES)
    text = marked(out, passage.page_content, answer.matches.strong_marks(match))
    for line in best_lines(list(wrap(readable(passage, text), out.width - 6))):
        out.print(Text.assemble("  ", line))


def marked(out: Console, text: str, marks: Sequence[Mark]) -> Text:
    """Show marks in bold and underlined, or in brackets where there are no styles."""
    styled = out.color_system is not None and not out.no_color
    text, parts, last = printable(text), [], 0
    for start, end, score in marks:
        mark = text[start:end] if styled else f"[{text[start:end]}]"
        style = Style(bold=styled, underline=styled, meta={"score": score})
        parts += [text[last:start], (mark, style)]
        last = end
    return Text.assemble(*parts, text[last:])


def best_lines(lines: list[Text]) -> list[Text]:
    """Choose the lines in a row that hold the best matches, with dots for what is left out."""

    def score(first: int) -> float:
        spans = [span.style for line in lines[first : first + LINES] for span in line.spans]
        return sum(style.meta["score"] for style in spans if isinstance(style, Style))

    first = max(range(max(len(lines) - LINES, 0) + 1), key=score)
    chosen = lines[first : first + LINES]
    if first:
        chosen[0] = Text.assemble("… ", chosen[0])
    if first + LINES < len(lines):
        chosen[-1] = Text.assemble(chosen[-1], " …")
    return chosen


def write_page(path: Path, answers: Sequence[Answer], model: str) -> None:
    """Write the answers to a page that needs nothing else; what was there is replaced."""
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    tools = {"location": location, "readable": readable}
    path.write_text(template.render(answers=answers, model=model, **tools), encoding="utf-8")


def answerer(store: Chroma, args: argparse.Namespace) -> Callable[[str], None]:
    """Give the function that answers a question on the terminal and, if asked, on a page."""
    answers: list[Answer] = []
    model = "a small model for demonstrations, not BGE-M3" if args.small else args.model

    def answer(query: str) -> None:
        answers.append(search(store, query, args.k))
        show(answers[-1])
        if args.html:
            write_page(args.html, answers, model)

    return answer


def run(args: argparse.Namespace) -> None:
    """Index the folder, then answer one question, the built-in ones, or all that are asked."""
    check(args)
    if args.html and (args.html.is_dir() or not args.html.parent.is_dir()):
        msg = f"--html {args.html} is a folder, or in none. Name a file in a folder that exists."
        raise ValueError(msg)
    store = open_documents(args, lexical=True)
    ask(answerer(store, args), args.query, QUESTIONS)
    if args.html and args.html.exists():
        say(f"The page is in {args.html}.")


def main(arguments: list[str] | None = None) -> int:
    parser = search_options("Show the signals of hybrid search side by side.", k=5)
    parser.add_argument("--query", help="one question (default: a prompt)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    return exit_status(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
