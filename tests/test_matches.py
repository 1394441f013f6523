"""Marks in a text, and the parts of it that are shown."""

import pytest
from hybrid_terminal import OFF, ON, styled
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from matches import (
    CLOSING,
    MARKERS,
    OPENING,
    Explainer,
    Mark,
    Match,
    excerpt,
    joined,
    lettered,
    window,
)
from terminal import cells, fit

STRIPPED = dict.fromkeys(map(ord, MARKERS))
TEXTS = st.text(st.sampled_from("ab ，。向量\ufe00\u034f\n"), max_size=60)


@given(TEXTS, st.integers(0, 30))
def test_fitted_text_has_the_width(text, width):
    assert cells(fit(text, width)) == width


@given(
    TEXTS.filter(str.strip),
    st.lists(st.integers(0, 59), max_size=8, unique=True),
    st.integers(8, 60),
)
def test_an_excerpt_is_a_part_of_the_text_with_whole_marks(text, starts, room):
    marks = [Mark(n, n + 1, n + 1) for n in sorted(starts) if n < len(text)]
    passage = Document(text, metadata={"source": "a"})
    shown = excerpt(Match(passage, {}, marks), 60, room)
    inner = shown.translate(STRIPPED).removeprefix("… ").removesuffix(" …").strip()
    assert inner in text.translate(STRIPPED)
    opened = [char for char in shown if char in MARKERS]
    assert all(char in OPENING for char in opened[::2])
    assert opened[1::2] == [CLOSING] * (len(opened) // 2)


def test_the_window_is_where_the_strongest_matches_are():
    text = "seal " + "word " * 100 + "shelf seal " + "word " * 100
    marks = [Mark(0, 4, 0.3), Mark(505, 510, 0.4), Mark(511, 515, 0.3)]
    start, end = window(text, marks, 60)
    assert text[start:end].strip().startswith("word word")
    assert "shelf seal" in text[start:end]
    assert end - start <= 66


@pytest.mark.parametrize(
    ("text", "places", "marked"),
    [
        ("VS-2208-K", [(0, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 9)], ["VS-2208-K"]),
        ("VS-2280-K", [(0, 2), (2, 3), (7, 8), (8, 9)], ["VS", "K"]),
        ("a seal, sealed", [(2, 6), (6, 7), (8, 12)], ["seal", "seal"]),
        ("稠密向量。", [(0, 2), (2, 4), (4, 5)], ["稠密", "向量"]),
        ("#", [(0, 1)], []),
    ],
)
def test_marks_that_touch_are_one_and_punctuation_is_none(text, places, marked):
    marks = joined(text, [Mark(start, end, 1.0) for start, end in places])
    assert [text[mark.start : mark.end] for mark in marks] == marked


def test_weights_of_a_word_are_those_of_its_tokens(tiny):
    [weights] = tiny.encode(["稠密 vectors"], dense=False, lexical=True).lexical
    words = Explainer(tiny).words("稠密 vectors")
    assert words[-1].text == "vectors"
    assert len(words[-1].tokens) > 1
    assert {token: w for word in words for token, _, w in word.tokens if w} == weights


def test_a_mark_goes_on_in_the_next_line(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = styled(f"{OPENING[0]}稠密向量{CLOSING}检索", 6)
    assert lines == [f"{ON}稠密向{OFF}", f"{ON}量{OFF}检索"]


def test_a_bracket_stays_with_its_word(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled(f"意思相{OPENING[0]}同{CLOSING}，却", 8) == ["意思相", "[同]，却"]


def test_parts_of_a_word_are_shown_as_such(small):
    [word] = Explainer(small).words("Cormack")
    first, middle, _ = (token for token, _, _ in word.tokens)
    assert word.shared([first]) == "Co…"
    assert word.shared([middle]) == "…rma…"


def test_letters_count_on_after_z():
    assert [lettered(number) for number in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]
