"""Why a passage matched a query: the tokens that both hold, and those that are similar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape as escape_html
from importlib.resources import files
from statistics import fmean
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.documents import Document

from langchain_bge_dense._scoring import SCORES, product, score_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from langchain_bge_dense.chroma.store import BGEM3Chroma
    from langchain_bge_dense.embeddings import BGEM3Embeddings

__all__ = [
    "Mark",
    "Match",
    "Matches",
    "SharedToken",
    "SimilarToken",
    "Token",
    "Word",
    "find_matches",
]

_CJK = r"\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_LETTER_PAIR = re.compile(rf"[^\W{_CJK}]{{2}}")
_UNBROKEN_PAIR = re.compile(rf"[^\s{_CJK}]{{2}}")
_WORD_START = "▁"  # SentencePiece's, of no width where it is a token by itself
_FAINTEST = 0.05  # of the strongest mark: what is weaker is noise to a reader
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # no text of a page
_SMALLEST = 0.005  # the smallest weight that two decimals show
_CONTEXT = 120  # characters shown on each side of a mark

_FOLDER = files(__package__)
_STYLE = f"<style>\n{_FOLDER.joinpath('matches.css').read_text('utf-8')}</style>"
_PAGE = Template(_FOLDER.joinpath("matches.html").read_text("utf-8"))


class Token(NamedTuple):
    """A token of the query: its id in the vocabulary, its text there, and its lexical weight."""

    id: int
    text: str
    weight: float


class SharedToken(NamedTuple):
    """A token that query and passage both hold, as it stands in the query."""

    text: str
    query_weight: float
    passage_weight: float

    @property
    def score(self) -> float:
        """The product of its weights, a part of the lexical score."""
        return self.query_weight * self.passage_weight


class SimilarToken(NamedTuple):
    """A token of the query, and the passage's most similar one, from `start` to `end`.

    The token that closes a text has none, and neither have those of a document's instruction.
    """

    text: str
    passage_text: str
    start: int
    end: int
    similarity: float


class Mark(NamedTuple):
    """Where a passage holds what the query holds: from `start` to `end`, by its best token."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Word:
    """A word of the query and the tokens that it is made of."""

    text: str
    tokens: tuple[Token, ...]

    @property
    def weight(self) -> float:
        """The sum of its tokens' weights."""
        return sum(token.weight for token in self.tokens)

    def shared(self, ids: Collection[int]) -> str:
        """Write the word, with an ellipsis for tokens that are not among `ids`."""
        parts = (token.text if token.id in ids else "…" for token in self.tokens)
        return re.sub("…+", "…", "".join(parts))


@dataclass(frozen=True)
class Match:
    """Tokens that a passage shares with the query.

    Attributes:
        document: The passage.
        tokens: The shared tokens, the largest score first. A token counts once, however often
            query and passage repeat it.
        words: The same by words of the query: a word, or the shared part of it, and its score.
        marks: Places in the passage, in order; tokens that touch inside a word are one mark.
        similar: Each token of the query, the one that closes it included, with the passage's token
            that is most similar to it, in the order of the query.
    """

    document: Document
    tokens: tuple[SharedToken, ...]
    words: Mapping[str, float]
    marks: tuple[Mark, ...]
    similar: tuple[SimilarToken, ...] = ()

    @property
    def lexical_score(self) -> float:
        """The sum of the tokens' scores."""
        return sum(token.score for token in self.tokens)

    @property
    def colbert_score(self) -> float:
        """The mean of the similar tokens' similarities."""
        return fmean(token.similarity for token in self.similar) if self.similar else 0.0


@dataclass(frozen=True)
class Matches:
    """A query and its matches in passages; a notebook shows it as a table of marked passages.

    Attributes:
        query: The query, behind the instruction that the embeddings put in front of it.
        words: The query's words with the weights of their tokens.
        passages: One match per passage, in the order of the passages.
    """

    query: str
    words: tuple[Word, ...]
    passages: tuple[Match, ...]

    def strong_marks(self, match: Match) -> list[Mark]:
        """Select the marks of a passage that are not faint beside the strongest of all passages."""
        return [mark for mark in match.marks if mark.score >= _FAINTEST * self._strongest]

    def to_html(self, labels: Sequence[str] | None = None) -> str:
        """Write the query's words and the marked passages as a fragment of HTML.

        Args:
            labels: Titles of the passages, by default their number and `metadata["source"]`.

        Returns:
            One `div` with its own style. All texts are escaped; long passages are cut to what
            surrounds their marks.

        Example:
            >>> embeddings = BGEM3Embeddings(model=checkpoint)
            >>> html = find_matches(embeddings, "equal", ["<i>equal</i> rights"]).to_html()
            >>> "&lt;" in html, "<i>" in html
            (True, False)
        """
        words = "\n".join(_word_html(word, self.words) for word in self.words)
        sources = (match.document.metadata.get("source", "") for match in self.passages)
        numbered = (f"{n}  {source}".rstrip() for n, source in enumerate(sources, start=1))
        sections = "\n".join(
            self._section(match, label)
            for match, label in zip(self.passages, labels or numbered, strict=True)
        )
        query = f'<div class="query">\n{words}\n</div>'
        return f'<div class="m3-matches">{_STYLE}\n{query}\n{sections}\n</div>'

    def to_page(self) -> str:
        """Write a whole page, which needs no other file and runs no script.

        Example:
            >>> matches = find_matches(BGEM3Embeddings(model=checkpoint), "equal", ["all equal"])
            >>> matches.to_page().splitlines()[0]
            '<!doctype html>'
        """
        return _PAGE.substitute(title=_escape(self.query), body=self.to_html())

    def _repr_html_(self) -> str:
        return self.to_html()

    @property
    def _strongest(self) -> float:
        return max((mark.score for match in self.passages for mark in match.marks), default=0)

    def _underlined(self, match: Match) -> list[Mark]:
        """Find the spans of tokens that are at least half as similar as the best of all."""
        found = [token.similarity for each in self.passages for token in each.similar]
        strong = [token for token in match.similar if token.similarity >= max(found) / 2]
        places = sorted(Mark(token.start, token.end, token.similarity) for token in strong)
        return _joined(match.document.page_content, places)

    def _section(self, match: Match, label: str) -> str:
        words = [f"{_quoted(_escape(w))} {s:.2f}" for w, s in match.words.items() if s >= _SMALLEST]
        marks = [m._replace(score=m.score / self._strongest) for m in self.strong_marks(match)]
        text = _marked(match.document.page_content, marks, self._underlined(match))
        total = f"<b>Lexical {match.lexical_score:.2f}</b>"
        return f"""<section>
<header><b>{_escape(label)}</b>
<small>{_other_scores(match)}</small>
<small>{total} = {" + ".join(words) or "no word in common"}</small></header>
<p class="text" dir="auto">{text}</p>
{_similar_html(match)}</section>"""


def find_matches(
    embeddings: BGEM3Embeddings,
    query: str,
    passages: Iterable[str | Document],
    *,
    store: BGEM3Chroma | None = None,
) -> Matches:
    """Find what passages share with a query by the model's own tokens, weights and vectors.

    The lexical and the ColBERT score of each passage are those that `BGEM3Retriever` and
    `BGEM3Reranker` give it.

    Args:
        embeddings: The model, which needs its lexical and ColBERT heads.
        query: The query.
        passages: Texts, or documents such as a retriever returns.
        store: Of `open_chroma`. Similarities of documents whose ColBERT codes it keeps, one for
            each token, are computed from these, as its retriever does.

    Returns:
        The matches: `words` of the query, and `passages` with their shared and similar tokens.

    Raises:
        TypeError: The query or a passage is not a string.
        ValueError: The checkpoint has no heads, or the store is of another model.

    Example:
        >>> from langchain_bge_dense.matches import find_matches
        >>> embeddings = BGEM3Embeddings(model=checkpoint)
        >>> matches = find_matches(embeddings, "equal rights", ["All have equal rights.", "Rain."])
        >>> [word.text for word in matches.words]
        ['equal', 'rights']
        >>> first, second = matches.passages
        >>> first.lexical_score > 0, second.tokens
        (True, ())
        >>> [first.document.page_content[start:end] for start, end, _ in first.marks]
        ['equal', 'rights']
        >>> first.colbert_score > second.colbert_score
        True
    """
    documents = _documents(passages)
    asked_text = embeddings.session().queries.instruction + query
    asked: Any = embeddings.encode([query], dense=False, lexical=True, colbert=True, query=True)
    words = _words(embeddings, asked_text, asked.lexical[0])
    stored = _stored(embeddings, store, documents)
    texts = [document.page_content for document in documents]
    computed = len(stored) < len(texts)
    held: Any = embeddings.encode(texts, dense=False, lexical=True, colbert=computed)
    matches = []
    for row, document in enumerate(documents):
        vectors = stored[row] if row in stored else held.colbert[row]  # (T, D)
        similarities = product(asked.colbert[0], vectors.T)  # (Q, T)
        matches.append(_match(embeddings, words, document, held.lexical[row], similarities))
    return Matches(asked_text, tuple(words), tuple(matches))


def _documents(passages: Iterable[str | Document]) -> list[Document]:
    if isinstance(passages, (str, Document)):
        msg = f"passages is one {type(passages).__name__}. Pass a list of strings or documents."
        raise TypeError(msg)
    return [
        p if isinstance(p, Document) else Document.model_construct(page_content=p) for p in passages
    ]


def _stored(
    embeddings: BGEM3Embeddings, store: BGEM3Chroma | None, documents: Sequence[Document]
) -> dict[int, NDArray[np.float32]]:
    """Look up ColBERT vectors, `(T, D)`, by row, of documents that have one for each token."""
    if store is None:
        return {}
    from langchain_bge_dense.chroma.search import model_of
    from langchain_bge_dense.chroma.signals import key_of

    model_of(store, embeddings)  # raises where it is another
    rows = {key_of(d.id, d.page_content): row for row, d in enumerate(documents) if d.id}
    vectors = store.passages.colbert_vectors(list(rows))
    return {rows[key]: found for key, found in vectors.items()}


def _spans(
    embeddings: BGEM3Embeddings, text: str, instruction: str = ""
) -> list[tuple[int, int, int]]:
    """Find tokens and their spans in the text. Those of an instruction have no width."""
    found = embeddings.engine().token_spans(instruction + text)
    offset = len(instruction)
    return [(id_, max(start - offset, 0), max(end - offset, 0)) for id_, start, end in found]


def _words(embeddings: BGEM3Embeddings, query: str, weights: dict[int, float]) -> list[Word]:
    groups: list[list[Token]] = []
    last = 0
    for token, start, end in _spans(embeddings, query):
        part = Token(token, query[start:end] or _WORD_START, weights.get(token, 0.0))
        inside = last == start and bool(_LETTER_PAIR.fullmatch(query, start - 1, start + 1))
        if groups and inside:
            groups[-1].append(part)
        else:
            groups.append([part])
        last = end
    return [Word("".join(token.text for token in group), tuple(group)) for group in groups]


def _match(
    embeddings: BGEM3Embeddings,
    words: Sequence[Word],
    document: Document,
    held: dict[int, float],
    similarities: NDArray[np.float32],
) -> Match:
    tokens: dict[int, SharedToken] = {}
    scores: dict[str, float] = {}
    for word in words:
        new = {
            id_: SharedToken(text, weight, held[id_])
            for id_, text, weight in word.tokens
            if id_ not in tokens and weight * held.get(id_, 0) > 0
        }
        if new:
            name = word.shared(new)
            scores[name] = scores.get(name, 0) + sum(token.score for token in new.values())
        tokens |= new
    text = document.page_content
    spans = _spans(embeddings, text, embeddings.session().documents.instruction)
    marks = [Mark(start, end, tokens[id_].score) for id_, start, end in spans if id_ in tokens]
    return Match(
        document,
        tuple(sorted(tokens.values(), key=lambda token: -token.score)),
        dict(sorted(scores.items(), key=lambda item: -item[1])),
        tuple(_joined(text, marks)),
        tuple(_similar(words, text, similarities, spans)),
    )


def _similar(
    words: Iterable[Word],
    text: str,
    similarities: NDArray[np.float32],
    spans: Sequence[tuple[int, int, int]],
) -> Iterable[SimilarToken]:
    """Find the best of each row of `(Q, T)` similarities, whose last row and column close texts."""
    tokens = [token.text for word in words for token in word.tokens][: len(similarities) - 1]
    places = [(start, end) for _, start, end in spans[: similarities.shape[1] - 1]]
    for row, column in enumerate(similarities.argmax(axis=1).tolist()):  # (Q,)
        start, end = places[column] if column < len(places) else (len(text), len(text))
        asked = tokens[row] if row < len(tokens) else ""
        yield SimilarToken(asked, text[start:end], start, end, float(similarities[row, column]))


def _joined(text: str, marks: Iterable[Mark]) -> list[Mark]:
    """Join marks that touch inside what is written without a blank, such as a part number.

    Chinese is written so from end to end, and not joined. A mark ends in letters or digits:
    punctuation is marked between other marks alone.
    """
    joined: list[Mark] = []
    for mark in marks:
        last = joined[-1] if joined else None
        if last and _touch(text, last, mark):
            joined[-1] = Mark(last.start, max(last.end, mark.end), max(last.score, mark.score))
        else:
            joined.append(mark)
    return [Mark(*ends, mark.score) for mark in joined if (ends := _bare(text, mark))]


def _touch(text: str, before: Mark, after: Mark) -> bool:
    edge = after.start
    return before.end > edge or (
        before.end == edge and bool(_UNBROKEN_PAIR.fullmatch(text, edge - 1, edge + 1))
    )


def _bare(text: str, mark: Mark) -> tuple[int, int] | None:
    """Strip punctuation from the ends of a mark, if anything else remains."""
    found = re.search(r"\w(?:.*\w)?", text[mark.start : mark.end], re.DOTALL)
    return (mark.start + found.start(), mark.start + found.end()) if found else None


def _escape(text: str) -> str:
    return escape_html(_CONTROL.sub("\ufffd", text))


def _quoted(html: str) -> str:
    """Quote a token beside a number, which a hyphen would make a negative one."""
    return f"“{html}”"


def _other_scores(match: Match) -> str:
    """Read the scores that a retriever or reranker wrote to the metadata."""
    scores = {
        name: value
        for name in SCORES
        if name not in {"lexical", "colbert"}
        and (value := match.document.metadata.get(score_key(name))) is not None
    }
    return " · ".join(f"{_escape(name.capitalize())} {value:.2f}" for name, value in scores.items())


def _word_html(word: Word, words: Iterable[Word]) -> str:
    largest = max(token.weight for each in words for token in each.tokens)
    tokens = "".join(
        f'<span class="token">{_tagged("mark", _escape(text), weight / largest if largest else 0)}'
        f"<small>{weight:.2f}</small></span>"
        for _, text, weight in word.tokens
    )
    return f'<span class="word">{tokens}</span>'


def _marked(text: str, marks: Sequence[Mark], underlined: Sequence[Mark]) -> str:
    """Write a passage with marks and underlined spans, cut to what surrounds them."""

    def inner(start: int, end: int) -> str:
        return _annotated("u", start, end, underlined, lambda *ends: _escape(_cut(text, *ends)))

    return _annotated("mark", 0, len(text), marks, inner)


def _annotated(
    tag: str, start: int, end: int, marks: Iterable[Mark], inner: Callable[[int, int], str]
) -> str:
    """Write what is from `start` to `end` by `inner`, and put what is marked there into tags."""
    parts = []
    for mark in marks:
        first, last = max(mark.start, start), min(mark.end, end)
        if first < last:
            parts += [inner(start, first), _tagged(tag, inner(first, last), mark.score)]
            start = last
    return "".join([*parts, inner(start, end)])


def _cut(text: str, start: int, end: int) -> str:
    """Shorten a part of a text to what follows the mark before and leads to the mark after."""
    before, after = start > 0 or end == len(text), end < len(text)
    part = text[start:end]
    if len(part) <= _CONTEXT * (before + after) + _CONTEXT:
        return part
    head = re.sub(r"\s\S{0,20}$", "", part[:_CONTEXT]) if before else ""
    tail = re.sub(r"^\S{0,20}\s", "", part[-_CONTEXT:]) if after else ""
    return f"{head} … {tail}"


def _tagged(tag: str, html: str, strength: float) -> str:
    return f'<{tag} style="--strength: {min(max(strength, 0), 1):.2f}">{html}</{tag}>'


def _similar_html(match: Match) -> str:
    """Write the tokens of the query and what is most similar to each, without punctuation."""
    if not match.similar:
        return ""
    tokens = (
        f"<span><bdi>{_quoted(_escape(text))}</bdi> → "
        f"<bdi>{_quoted(_tagged('u', _escape(found), similarity))}</bdi> {similarity:.2f}</span>"
        for text, found, _, _, similarity in match.similar
        if found and re.search(r"\w", text)
    )
    score = f"<b>{_tagged('u', 'ColBERT', 1)} {match.colbert_score:.2f}</b>"
    return "\n".join([f'<small class="similar">{score}', *tokens, "</small>\n"])
