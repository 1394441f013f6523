"""Rankings side by side and marked passages, as one page of HTML that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from matches import CLOSING, OPENING, VISIBLE, excerpt, level
from terminal import place, plain, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.documents import Document
    from matches import Answer, Column, Match, Word

TEMPLATE = Path(__file__).with_suffix(".html")
ROOM = 520  # cells of a marked passage
BEGINNING = 240  # characters of a passage in a column; the page cuts it to two lines


def write_page(path: Path, answers: Sequence[Answer], model: str) -> None:
    """Write the answers to a page; what was there is replaced.

    Args:
        path: A file in a folder that exists.
        answers: One or more.
        model: What the page says about the model.
    """
    labels = sorted({label for answer in answers for label in answer.labels.values()})
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=text("Hybrid search: " + answers[0].query),
        hover="\n".join(map(hover, labels)),
        answers="\n".join(section(number, answer) for number, answer in enumerate(answers)),
        model=text(model),
    )
    path.write_text(page, encoding="utf-8")


def text(value: str) -> str:
    """Make any text safe to stand in a page, in one line."""
    return escape(plain(value))


def hover(label: str) -> str:
    """Light up a passage in all columns of its answer."""
    passage = f'[data-passage="{label}"]'
    return f".answer:has({passage}:hover) {passage} {{ background: var(--touch); }}"


def section(number: int, answer: Answer) -> str:
    """Write down one query: its columns, its words, and the passages that are explained."""
    links = {match.passage.id: f"q{number}-{n}" for n, match in enumerate(answer.matches)}
    columns = "\n".join(column(part, answer, links) for part in answer.columns)
    top = max((weight for word in answer.words for _, _, weight in word.tokens), default=0) or 1
    words = "\n".join(query_word(word, top) for word in answer.words)
    matches = "\n".join(explained(match, answer, links) for match in answer.matches)
    return f"""<article class="answer">
<h1 dir="auto">{text(answer.query)}</h1>
<div class="columns">
{columns}
</div>
<h3>Why</h3>
<p class="note">The query&#x27;s tokens with their lexical weights, and the best fused passages with
what they share.</p>
<div class="query">
{words}
</div>
{matches}
</article>"""


def column(part: Column, answer: Answer, links: dict[str | None, str]) -> str:
    """Write down one ranking."""
    top = max((passage.metadata[part.score] for passage in part.passages), default=0) or 1
    rows = [row(passage, part.score, top, answer, links) for passage in part.passages]
    ranking = "<ol>\n" + "\n".join(rows) + "\n</ol>" if rows else '<p class="note">No passage.</p>'
    return f"""<section>
<h2>{text(part.name)}</h2>
<p class="note">{text(part.note)}</p>
{ranking}
</section>"""


def row(
    passage: Document, score: str, top: float, answer: Answer, links: dict[str | None, str]
) -> str:
    """Write down one passage of a ranking, with a bar for its score."""
    label, link = answer.labels[passage.id], links.get(passage.id)
    badge = f'<a class="badge" href="#{link}">{label}</a>' if link else chip(label)
    value = passage.metadata[score]
    return f"""<li data-passage="{label}">
<div class="head">{badge}<span class="place">{text(place(passage))}</span>\
<span class="score">{value:.2f}</span></div>
<div class="bar"><i style="width: {max(value / top, 0):.0%}"></i></div>
<p class="excerpt" dir="auto">{text(readable(passage)[:BEGINNING])}</p>
</li>"""


def chip(label: str) -> str:
    """Write down the letter of a passage."""
    return f'<span class="badge">{label}</span>'


def query_word(word: Word, top: float) -> str:
    """Write down a word of the query, each token with its weight below."""
    tokens = "".join(
        f'<span class="token"><mark class="m{level(weight, top)}">{text(part)}</mark>'
        f'<span class="w">{weight:.2f}</span></span>'
        for _, part, weight in word.tokens
    )
    return f'<span class="word">{tokens}</span>'


def explained(match: Match, answer: Answer, links: dict[str | None, str]) -> str:
    """Write down why a passage matched."""
    passage = match.passage
    shares = [f"{text(w)} {share:.2f}" for w, share in match.shares.items() if share >= VISIBLE]
    dense, lexical = (passage.metadata[f"{name}_score"] for name in ("dense", "lexical"))
    return f"""<section class="match" id="{links[passage.id]}">
<div>
<div class="head">{chip(answer.labels[passage.id])}
<span class="place">{text(place(passage))}</span></div>
<p class="parts"><b>Dense {dense:.2f}</b></p>
<p class="parts"><b>Lexical {lexical:.2f}</b> = {" + ".join(shares) or "no word in common"}</p>
</div>
<p class="text" dir="auto">{marked_html(excerpt(match, answer.strongest, ROOM))}</p>
</section>"""


def marked_html(marked: str) -> str:
    """Turn the marks in a text into those of HTML."""
    tags = {ord(char): f'<mark class="m{n}">' for n, char in enumerate(OPENING)}
    return text(marked).translate(tags | {ord(CLOSING): "</mark>"})
