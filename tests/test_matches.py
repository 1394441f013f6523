"""Which tokens a passage shares with a query, what they add, and how that is shown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense._scoring import maxsim_scores
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.matches import (
    Mark,
    Match,
    Matches,
    SimilarToken,
    Token,
    Word,
    _joined,
    find_matches,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from langchain_bge_dense import BGEM3Embeddings

PART = "Which shelf holds the seal VS-2208-K?"
SHELF = "part: VS-2208-K\nname: Valve seal\nshelf: C-14"
OTHER = "part: VS-2280-K\nname: Valve seal\nshelf: C-15"


def marked(match: Match) -> list[str]:
    return [match.document.page_content[start:end] for start, end, _ in match.marks]


def texts(html: str) -> list[str]:
    return [part.text for part in BeautifulSoup(html, "html.parser").select(".text")]


def lexical_score(embeddings: BGEM3Embeddings, query: str, passage: str) -> float:
    """The score as the model's own weights give it."""
    [asked] = embeddings.encode([query], dense=False, lexical=True, query=True).lexical
    [held] = embeddings.encode([passage], dense=False, lexical=True).lexical
    return sum(weight * held.get(token, 0) for token, weight in asked.items())


def test_words_are_marked_whole_and_what_differs_is_not(small: BGEM3Embeddings) -> None:
    first, second = find_matches(small, PART, [SHELF, OTHER]).passages
    assert marked(first) == ["VS-2208-K", "seal", "shelf"]
    assert marked(second) == ["VS-22", "K", "seal", "shelf"]
    assert first.lexical_score > second.lexical_score
    assert first.words.keys() > {"-2208", "shelf", "seal"}
    assert "-2208" not in second.words


@pytest.mark.parametrize("query", [PART, "seal seal, the seal", "Büttcher's C-14 on a shelf", ""])
def test_tokens_and_words_add_up_to_the_lexical_score(small: BGEM3Embeddings, query: str) -> None:
    passages = [SHELF, "Cormack, Clarke and Büttcher", "nothing", ""]
    found = find_matches(small, query, passages)
    for match, passage in zip(found.passages, passages, strict=True):
        expected = lexical_score(small, query, passage)
        assert match.lexical_score == pytest.approx(expected, abs=1e-5)
        assert sum(match.words.values()) == pytest.approx(expected, abs=1e-5)
        assert [t.score for t in match.tokens] == [
            t.query_weight * t.passage_weight for t in match.tokens
        ]
        assert list(match.words.values()) == sorted(match.words.values(), reverse=True)


def test_an_instruction_counts_as_it_does_in_the_score(small: BGEM3Embeddings) -> None:
    instructed = small.model_copy(update={"query_instruction": "Find a shelf: "})
    [match] = find_matches(instructed, "seal", [SHELF]).passages
    assert match.words.keys() >= {"shelf", "seal"}
    assert match.lexical_score == pytest.approx(lexical_score(instructed, "seal", SHELF), abs=1e-5)


def test_chinese_is_marked_token_by_token(tiny: BGEM3Embeddings) -> None:
    text = "今天天气很好。意思相近的是稠密向量!"
    found = find_matches(tiny, "稠密向量", [text, "人人有权享有生命。"])
    assert "".join(marked(found.passages[0])) == "稠密向量"
    assert marked(found.passages[1]) == []
    assert texts(found.to_html())[0] == text


def test_weights_of_a_word_are_those_of_its_tokens(tiny: BGEM3Embeddings) -> None:
    [weights] = tiny.encode(["稠密 vectors"], dense=False, lexical=True).lexical
    words = find_matches(tiny, "稠密 vectors", []).words
    assert words[-1].text == "vectors"
    assert len(words[-1].tokens) > 1
    assert {token: w for word in words for token, _, w in word.tokens if w} == weights


def test_parts_of_a_word_are_shown_as_such() -> None:
    word = Word("Cormack", (Token(1, "Co", 0.1), Token(2, "rma", 0.1), Token(3, "ck", 0.1)))
    assert word.shared({1}) == "Co…"
    assert word.shared({2}) == "…rma…"
    assert word.weight == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("VS-2208-K", [(0, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 9)], ["VS-2208-K"]),
        ("VS-2280-K", [(0, 2), (2, 3), (7, 8), (8, 9)], ["VS", "K"]),
        ("a seal, sealed", [(2, 6), (6, 7), (8, 12)], ["seal", "seal"]),
        ("稠密向量。", [(0, 2), (2, 4), (4, 5)], ["稠密", "向量"]),
        ("a ﬁx", [(2, 3), (2, 3), (3, 4)], ["ﬁx"]),  # one character of the text, two tokens
        ("#", [(0, 1)], []),
    ],
)
def test_marks_that_touch_are_one(
    text: str, spans: list[tuple[int, int]], expected: list[str]
) -> None:
    marks = _joined(text, [Mark(start, end, 1.0) for start, end in spans])
    assert [text[mark.start : mark.end] for mark in marks] == expected


def colbert_scores(embeddings: BGEM3Embeddings, query: str, passages: Iterable[str]) -> list[float]:
    """The scores as the model's own vectors give them."""
    [asked] = embeddings.encode([query], dense=False, colbert=True, query=True).colbert
    held = embeddings.encode(passages, dense=False, colbert=True).colbert
    return maxsim_scores(asked, held).tolist()


FIELDS = [
    {},
    {"query_instruction": "find a shelf: ", "document_instruction": "a list: "},
    {"max_length": 8, "on_truncate": "ignore"},
    {"normalize": False},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("query", [PART, "seal 稠密向量", ""])
def test_similar_tokens_average_to_the_colbert_score(
    small: BGEM3Embeddings, query: str, fields: dict
) -> None:
    embeddings = small.model_copy(update=fields)
    passages = [SHELF, "a", "", "稠密向量 seal"]
    found = find_matches(embeddings, query, passages)
    expected = colbert_scores(embeddings, query, passages)
    scores = [match.colbert_score for match in found.passages]
    # Without normalisation scores are in the hundreds: float32's digits, not its decimals.
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tokens = [token.text for word in found.words for token in word.tokens]
    for match, passage in zip(found.passages, passages, strict=True):
        *similar, (closing, *_) = match.similar
        assert [token.text for token in similar] == tokens[: len(similar)]
        assert len(similar) == min(len(tokens), fields.get("max_length", 99) - 2)
        assert closing == ""
        assert all(passage[t.start : t.end] == t.passage_text for t in match.similar)


@pytest.mark.parametrize("length", [None, 5, 6])
def test_a_token_finds_the_most_similar_one(small: BGEM3Embeddings, length: int | None) -> None:
    embeddings = small.model_copy(update={"max_length": length, "on_truncate": "ignore"})
    query, passage = "shelf of the Büttcher", "seal: Büttcher\nshelf: C-14"
    [match] = find_matches(embeddings, query, [passage]).passages
    asked, held = embeddings.encode([query, passage], dense=False, colbert=True).colbert
    spans = [passage[start:end] for _, start, end in small.engine().token_spans(passage)]
    texts = [*spans[: len(held) - 1], ""]
    best = (asked @ held.T).argmax(axis=1)
    assert [t.passage_text for t in match.similar] == [texts[column] for column in best]
    assert (length is None) == ("she" in {t.passage_text for t in match.similar})
    assert length or "" in {t.passage_text for t in match.similar}
    similarities = [t.similarity for t in match.similar]
    np.testing.assert_allclose(similarities, (asked @ held.T).max(axis=1), atol=1e-5)


def test_tokens_of_an_instruction_have_no_place(small: BGEM3Embeddings) -> None:
    instructed = small.model_copy(update={"document_instruction": "on a shelf: "})
    [match] = find_matches(instructed, "shelf seal", ["a seal"]).passages
    found = {token.text: token for token in match.similar}
    assert found["she"][:4] == ("she", "", 0, 0)
    assert found["she"].similarity > 0.8
    assert found["seal"][1:4] == ("seal", 2, 6)


@pytest.mark.parametrize("kind", ["1bit", "int8"])
def test_similarities_are_those_that_a_retriever_has_from_codes(
    small: BGEM3Embeddings, kind: str
) -> None:
    store = open_chroma(small, "parts", lexical=True, colbert=kind)
    documents = [Document(text, id=text) for text in (SHELF, OTHER, "Bees make honey.")]
    index_documents(store, documents)
    retriever = BGEM3Retriever(vectorstore=store, scores=True, colbert=True)
    retrieved = retriever.invoke(PART)
    from_codes = [document.metadata["bge_m3_colbert_score"] for document in retrieved]
    found = find_matches(small, PART, retrieved, store=store).passages
    assert [match.colbert_score for match in found] == pytest.approx(from_codes, abs=1e-5)
    exact = find_matches(small, PART, retrieved).passages
    differences = [
        abs(m.colbert_score - e.colbert_score) for m, e in zip(found, exact, strict=True)
    ]
    assert max(differences) > 1e-5
    assert {t.text: t.passage_text for t in found[0].similar}["-22"] == "-22"
    store.delete_collection()


@pytest.mark.parametrize(("pooling", "passage"), [(1, 0), (1, 1), (2, 2)])
def test_what_has_no_codes_for_its_tokens_is_computed(
    small: BGEM3Embeddings, pooling: int, passage: int
) -> None:
    store = open_chroma(small, "parts", colbert=True, colbert_pooling=pooling)
    kept = Document(OTHER, id="kept")
    index_documents(store, [Document("another text", id="changed"), kept])
    others = [SHELF, Document(SHELF, id="changed"), Document(OTHER, id="kept")]
    found = find_matches(small, PART, [kept, others[passage]], store=store)
    exact = find_matches(small, PART, [kept, others[passage]])
    assert found.passages[1] == exact.passages[1]
    assert (found.passages[0] == exact.passages[0]) is (pooling > 1)
    store.delete_collection()


def test_the_store_is_of_the_same_model(small: BGEM3Embeddings, tiny: BGEM3Embeddings) -> None:
    store = open_chroma(small, "parts", colbert=True)
    with pytest.raises(ValueError, match="holds vectors of"):
        find_matches(tiny, PART, [SHELF], store=store)


def test_a_page_shows_what_found_what(small: BGEM3Embeddings) -> None:
    found = find_matches(small, PART, [SHELF])
    [match] = found.passages
    page = BeautifulSoup(found.to_page(), "html.parser")
    head, *shown = page.select_one(".similar").find_all(["b", "span"])
    assert head.text == f"ColBERT {match.colbert_score:.2f}"
    expected = [
        f"“{text}” → “{passage_text}” {similarity:.2f}"
        for text, passage_text, _, _, similarity in match.similar
        if text not in ("", "-", "?") and passage_text
    ]
    assert [entry.text for entry in shown] == expected
    assert texts(found.to_html()) == [SHELF]
    inside = [part.text for part in page.select(".text mark u")]
    assert inside == ["VS-2208-K", "seal", "shelf"]


def test_a_page_underlines_by_similarity() -> None:
    text = "one two three four"
    similar = (
        SimilarToken("a", "two", 4, 7, 0.8),
        SimilarToken("b", "one", 0, 3, -0.2),
        SimilarToken("c", "three", 8, 13, 1.5),
        SimilarToken("d", "two", 4, 7, 0.76),
        SimilarToken("e", "four", 14, 18, 0.74),
        SimilarToken("", "", 18, 18, 0.4),
    )
    match = Match(Document(text), (), {}, (Mark(6, 10, 1.0),), similar)
    assert match.colbert_score == pytest.approx(4.0 / 6)
    page = BeautifulSoup(Matches("", (), (match,)).to_html(), "html.parser")
    underlined = [(part.text, part["style"][-4:]) for part in page.select(".text u")]
    pieces = [("tw", "0.80"), ("o", "0.80"), ("th", "1.00"), ("ree", "1.00")]
    assert underlined == pieces
    assert [mark.text for mark in page.select(".text mark")] == ["o th"]
    assert page.select_one(".text").text == text
    entries = [entry.u["style"][-4:] for entry in page.select(".similar span")]
    assert entries == ["0.80", "0.00", "1.00", "0.76", "0.74"]


def test_tokens_that_look_like_tags_stay_texts() -> None:
    match = Match(Document("<i>b"), (), {}, (), (SimilarToken("<b>a", "<i>b", 0, 4, 0.5),))
    page = BeautifulSoup(Matches("", (), (match,)).to_html(), "html.parser")
    assert page.select_one(".similar span").text == "“<b>a” → “<i>b” 0.50"
    assert page.select_one(".text").text == "<i>b"


def test_a_hyphen_does_not_read_as_a_minus() -> None:
    match = Match(Document("a-b"), (), {"a": 0.2, "-": 0.1}, (), ())
    page = BeautifulSoup(Matches("", (), (match,)).to_html(), "html.parser")
    assert "= “a” 0.20 + “-” 0.10" in page.header.text


def test_a_long_passage_shows_what_is_similar() -> None:
    text = "word " * 300 + "faucet " + "word " * 300
    match = Match(Document(text), (), {}, (), (SimilarToken("tap", "faucet", 1500, 1506, 0.5),))
    [shown] = texts(Matches("", (), (match,)).to_html())
    assert " word faucet word " in shown
    assert len(shown) < 800


def test_documents_keep_their_metadata_and_strings_become_documents(small: BGEM3Embeddings) -> None:
    document = Document(SHELF, metadata={"source": "parts.csv", "bge_m3_dense_score": 0.5})
    found = find_matches(small, PART, [document, OTHER])
    assert found.passages[0].document is document
    assert found.passages[1].document == Document(OTHER)
    heads = [head.text for head in BeautifulSoup(found.to_html(), "html.parser").select("header")]
    assert heads[0].startswith("1  parts.csv\nDense 0.50\nLexical ")
    assert heads[1].startswith("2\n")
    named = BeautifulSoup(found.to_html(["A", "<B>"]), "html.parser").select("header b")
    assert [name.text for name in named[::2]] == ["A", "<B>"]


def test_hostile_texts_stay_texts(small: BGEM3Embeddings) -> None:
    hostile = '<script>alert("seal")</script> </p><img src=x onerror=1> & seal'
    document = Document(hostile, metadata={"source": "<b>x", "bge_m3_dense_score": 0.5})
    page = BeautifulSoup(find_matches(small, hostile, [document]).to_page(), "html.parser")
    assert not page.select("script, img, i, p b")
    assert page.h1.text == page.title.text == hostile
    assert page.select_one(".text").text == hostile
    assert page.select_one("header b").text == "1  <b>x"
    assert "“script” → “script” " in page.select_one(".similar").text
    assert not page.select(".similar span > :not(bdi), bdi > :not(u), u > *")


def test_control_characters_do_not_reach_a_page() -> None:
    match = Match(Document("a\x1b[31m\x00b\nc\ud800"), (), {}, ())
    html = Matches("", (), (match,)).to_html()
    assert texts(html) == ["a\ufffd[31m\ufffdb\nc\ufffd"]
    html.encode()


def test_a_page_needs_nothing_else_and_a_notebook_gets_the_fragment(small: BGEM3Embeddings) -> None:
    found = find_matches(small, PART, [SHELF])
    page = found.to_page()
    assert found._repr_html_() == found.to_html() in page
    assert not re.search(r"https?://|url\(|@import|<script|src=", page)


def test_a_stronger_mark_is_a_larger_weight(small: BGEM3Embeddings) -> None:
    page = BeautifulSoup(find_matches(small, PART, [SHELF]).to_html(), "html.parser")
    strengths = {mark.text: mark["style"] for mark in page.select(".query mark")}
    assert strengths["seal"] == "--strength: 1.00"
    assert strengths["the"] < "--strength: 0.50"
    assert "--strength: 1.00" in {mark["style"] for mark in page.select(".text mark")}


def test_faint_marks_are_left_out() -> None:
    marks = (Mark(0, 1, 1.0), Mark(2, 3, 0.04), Mark(4, 5, 0.06))
    match = Match(Document("a b c"), (), {}, marks)
    assert Matches("", (), (match,)).strong_marks(match) == [marks[0], marks[2]]


WORDS = st.lists(st.sampled_from(["word", "稠密向量", "a", "x" * 60]), max_size=200).map(" ".join)


@given(WORDS, st.lists(st.integers(0, 400), max_size=5, unique=True))
def test_a_long_passage_is_cut_to_what_surrounds_its_marks(text: str, starts: list[int]) -> None:
    marks = tuple(Mark(n, n + 1, 1.0) for n in sorted(starts) if n < len(text))
    match = Match(Document(text), (), {}, marks)
    html = Matches("", (), (match,)).to_html()
    [shown] = texts(html)
    assert html.count("<mark") == len(marks)
    assert len(shown) <= (len(marks) + 1) * 400
    assert all(part in text for part in shown.split(" … "))
    assert shown.startswith(text[:50]) or marks


def test_no_passages_and_no_common_word(small: BGEM3Embeddings) -> None:
    assert find_matches(small, PART, []).passages == ()
    html = find_matches(small, PART, ["Bees make honey."]).to_html()
    assert "no word in common" in html


@pytest.mark.parametrize("passages", ["a passage", Document("a passage")])
def test_one_passage_is_not_a_list(tiny: BGEM3Embeddings, passages: object) -> None:
    with pytest.raises(TypeError, match=r"one (str|Document)\. Pass a list"):
        find_matches(tiny, "query", passages)


def test_a_passage_that_is_not_a_text_is_named(tiny: BGEM3Embeddings) -> None:
    with pytest.raises(TypeError, match=r"1 is int"):
        find_matches(tiny, "query", ["a passage", 5])


def test_a_long_passage_without_a_mark_shows_its_beginning() -> None:
    html = Matches("", (), (Match(Document("first " + "word " * 200), (), {}, ()),)).to_html()
    [shown] = texts(html)
    assert shown.startswith("first word word")
    assert shown.endswith("word … ")
    assert len(shown) < 150
