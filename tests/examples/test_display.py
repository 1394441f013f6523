"""Texts on a terminal: what fits, where lines break, what is cut."""

import io

import pytest
from display import fit, location, readable, show_answer, show_passages, wrap, write
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

TEXTS = st.text(st.sampled_from("ab ，。向量é\u0301"), max_size=80)


def wrapped(text, width):
    return [line.plain for line in wrap(Text(text), width)]


@given(TEXTS, st.integers(4, 30))
def test_wrapped_text_fits_and_is_whole(text, width):
    lines = wrapped(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("语义检索，很好。", 8, ["语义检", "索，很", "好。"]),
        ("意思相[同]，却", 8, ["意思相", "[同]，却"]),
        ("BGE-M3 支持一百多种语言", 12, ["BGE-M3 支持", "一百多种语言"]),
        ("one two three", 8, ["one two", "three"]),
        ("https://example.com/a b", 10, ["https://ex", "ample.com/", "a", "b"]),
    ],
)
def test_lines_break_between_words_and_chinese_characters(text, width, lines):
    assert wrapped(text, width) == lines


def test_what_is_left_out_shows_as_an_ellipsis():
    out = Console(file=io.StringIO(), width=10)
    write(out, "one two three four five", indent=2, lines=2)
    assert out.file.getvalue() == "  one two\n  three …\n"


@given(TEXTS, st.integers(1, 30))
def test_fitted_text_has_the_width(text, width):
    assert cell_len(fit(text, width)) == width


def test_location():
    document = Document("", metadata={"source": "a.json", "pointer": "/3"})
    assert location(document) == "a.json#/3"


def test_records_and_headings_are_readable_in_one_line():
    record = Document("code: E-1\ntext: two", metadata={"source": "a.csv", "row": 1})
    assert readable(record).plain == "code: E-1 · text: two"
    markdown = Document("## Part\n\nSome\ntext", metadata={"source": "a.md"})
    assert readable(markdown).plain == "Part: Some text"


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_passages_and_answers_fit_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = "A dense vector 把整段文字的意思压缩成一串数字，意思相近的段落在空间里彼此靠近。" * 9
    metadata = {"source": "a rather long name of a file.md", "bge_m3_dense_score": 0.5}
    show_passages([Document(text, metadata=metadata)] * 2)
    show_answer({"answer": f"{text}\n\n{text}", "passages": [Document("", metadata=metadata)]})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert all(cell_len(line) <= min(width, 100) for line in lines)
    assert not [line for line in lines if line.strip()[:1] in list("，。")]
