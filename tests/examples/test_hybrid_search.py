"""The example of four columns: what it shows on a terminal and on a page, run through `main`."""

import contextlib
import io
import re
from argparse import Namespace
from typing import NamedTuple

import hybrid_search
import pytest
from bs4 import BeautifulSoup
from display import fit, location
from folder_index import HANDBOOK, open_documents
from hybrid_search import best_lines, lettered, marked
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from tiny_m3 import build

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.matches import Mark

ENGLISH = HANDBOOK / "en"
NAMES = "What did Cormack, Clarke and Büttcher find?"
PART = "Which shelf holds the seal VS-2208-K?"
SETTINGS = ({"weights": (1, 0, 0)}, {"weights": (0, 1, 0)}, {}, {"colbert": True})
SCORES = (
    "bge_m3_dense_score",
    "bge_m3_lexical_score",
    "bge_m3_fused_score",
    "bge_m3_fused_score",
)


class Ran(NamedTuple):
    """What a run of `main` gave."""

    status: int
    out: str
    err: str


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def handbook_db(tmp_path_factory):
    return tmp_path_factory.mktemp("handbook")


@pytest.fixture(scope="module")
def model(small_checkpoint):
    """As `main` makes it; held, so that `main` need not load it each time."""
    with contextlib.closing(BGEM3Embeddings(model=str(small_checkpoint)).load()) as embeddings:
        yield embeddings


@pytest.fixture
def run(model, handbook_db, monkeypatch):
    """Run `main` on the small model; on the English handbook where nothing else is said."""

    def run(
        *options,
        documents=ENGLISH,
        db=handbook_db,
        model=model.model,
        width=140,
        stream=io.TextIOWrapper,
    ):
        monkeypatch.setenv("COLUMNS", str(width))
        places = ["--model", str(model), "--documents", str(documents), "--db", str(db)]
        out, err = stream(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = hybrid_search.main([*places, *map(str, options)])
        texts = []
        for written in (out, err):
            written.flush()
            texts.append(written.buffer.getvalue().decode())
        return Ran(status, *texts)

    return run


@pytest.fixture(scope="module")
def handbook(model, handbook_db):
    """The store that `main` fills."""
    places = {"documents": ENGLISH, "db": handbook_db}
    args = Namespace(small=False, server=None, model=model.model, **places)
    return open_documents(args, lexical=True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    return folder


def rankings(handbook, query, name, k=5):
    """What the retriever gives for each column, as (place, score)."""
    found = [
        BGEM3Retriever(scores=True, vectorstore=handbook, k=k, **settings).invoke(query)
        for settings in SETTINGS
    ]
    return [
        [(name(passage), f"{passage.metadata[score]:.2f}") for passage in passages]
        for passages, score in zip(found, SCORES, strict=True)
    ]


def printed(out):
    """The columns of a terminal of 140 cells, as (place, score)."""
    rows = out.split("\n\n")[1].splitlines()[2:]
    columns = [
        [row[start : start + 35].split(maxsplit=2) for row in rows] for start in range(0, 140, 35)
    ]
    return [[(place.strip(), score) for _, score, place in column] for column in columns]


def shown(passage):
    """A location as it stands in a column of a terminal of 140 cells."""
    return fit(location(passage), 25).rstrip()


def page(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def on_page(article):
    """The columns of a page, as (place, score)."""
    return [
        [(row.select_one(".place").text, row.select_one(".score").text) for row in part("li")]
        for part in article.select(".columns section")
    ]


def test_columns_are_what_the_retriever_gives(run, handbook, tmp_path):
    ran = run("--query", NAMES, "--html", tmp_path / "page.html")
    assert printed(ran.out) == rankings(handbook, NAMES, shown)
    [article] = page(tmp_path / "page.html").select("article")
    assert on_page(article) == rankings(handbook, NAMES, location)
    assert ran.err.endswith(f"The page is in {tmp_path}/page.html.\n")


def test_names_that_dense_search_misses_are_found(run):
    dense, lexical, fused, colbert = printed(run("--query", NAMES, "-k", 1).out)
    assert dense[0][0] != "hybrid-search.txt"
    assert {column[0][0] for column in (lexical, fused, colbert)} == {"hybrid-search.txt"}


def test_a_letter_stands_for_the_same_passage_in_all_columns(run, tmp_path):
    run("--query", NAMES, "--html", tmp_path / "page.html")
    rows = page(tmp_path / "page.html").select("li")
    texts = {(row["data-passage"], row.select_one(".excerpt").text) for row in rows}
    letters = {letter for letter, _ in texts}
    assert len(texts) == len(letters) < len(rows)
    assert letters == {lettered(number) for number in range(len(letters))}
    assert all(row["data-passage"] == row.select_one(".badge").text for row in rows)


def test_matching_words_are_marked_whole_and_others_are_not(run):
    out = run("--query", PART).out
    assert "part: [VS-2208-K] · name: Valve [seal], EPDM rubber" in out
    assert "part: [VS-22]80-[K] · name: Valve [seal], nitrile" in out
    assert re.search(
        r'"Which" 0\.\d\d, "shelf" = "she" 0\.\d\d \+ "lf" 0\.\d\d, ', " ".join(out.split())
    )
    assert re.search(r'^  lexical \d\.\d\d = "(shelf|-2208)" 0\.\d\d \+ "', out, re.MULTILINE)


def test_a_page_shows_the_same_marks_by_strength(run, tmp_path):
    run("--query", PART, "--html", tmp_path / "page.html")
    shown = page(tmp_path / "page.html")
    tokens = {mark.text: mark["style"] for mark in shown.select(".query mark")}
    assert tokens["seal"] == "--strength: 1.00"
    assert tokens["the"] < "--strength: 0.50"
    first, second = shown.select(".m3-matches section")[:2]
    marks = [{mark.text for mark in section.select(".text mark")} for section in (first, second)]
    assert marks[0] >= {"VS-2208-K", "seal", "shelf"}
    assert marks[1] >= {"VS-22", "K", "seal", "shelf"}
    links = [link for link in shown.select("li a") if link.has_attr("href")]
    assert {link.text for link in links} == {"A", "B", "C"}
    assert all(shown.select_one(link["href"]).text == "Why" for link in links)


def test_what_words_add_is_the_lexical_score(handbook):
    answer = hybrid_search.search(handbook, f"{NAMES} Cormack?", 5)
    for match in answer.matches.passages:
        score = match.document.metadata["bge_m3_lexical_score"]
        assert sum(match.words.values()) == pytest.approx(score, rel=0.02)  # bfloat16 on some CPUs
    strongest = list(answer.matches.passages[0].words)[:3]
    assert {"Büttcher", "…mack"} <= set(strongest)


def test_passages_without_a_common_word_are_no_lexical_matches(
    run, folder, tmp_path, tiny_checkpoint
):
    (folder / "bees.txt").write_text("Bees make honey.")
    places = {"documents": folder, "db": tmp_path / "db", "model": tiny_checkpoint}
    ran = run("--query", "人人", **places)
    assert [
        len(column) for column in ran.out.split("\n\n")[1].splitlines()[2].split("  ") if column
    ]
    assert "no passage" in ran.out
    assert "lexical 0.00 = no word in common" in ran.out


@pytest.mark.parametrize("question", ["Which wine goes with fish?", "哪种酒配鱼？"])
def test_a_question_that_nothing_answers_looks_like_one(run, tmp_path, question):
    note = "No passage seems to answer this."
    ran = run("--query", question, "--html", tmp_path / "page.html")
    assert note in ran.out.splitlines()
    assert page(tmp_path / "page.html").select_one("[role=status]").text == note
    assert note not in run().out  # the built-in questions


HOSTILE = '<script>alert("seal")</script> &amp; a seal \x1b[31m<mark>\ufe00'


def test_what_documents_and_questions_hold_is_text_on_a_page(run, folder, tmp_path):
    (folder / "<b>&.txt").write_text(HOSTILE)
    query = "a <img src=https://example.com/x onerror=alert(1)> seal"
    ran = run("--query", query, "--html", tmp_path / "p.html", documents=folder, db=tmp_path / "db")
    assert "\x1b" not in ran.out
    shown = page(tmp_path / "p.html")
    assert not shown.select("script, img, p b, link, iframe, object")
    assert shown.h1.text == query
    assert shown.select_one("section header b").text == "A  <b>&.txt"
    assert shown.select_one(".excerpt").text.startswith('<script>alert("seal")</script> &amp;')
    assert shown.select_one("section .text").text == HOSTILE.replace("\x1b", "\ufffd")
    assert {mark.text for mark in shown.select(".text mark")} >= {"seal"}


def test_a_page_needs_nothing_else(run, tmp_path):
    run("--html", tmp_path / "page.html")  # no terminal: the built-in questions
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = page(tmp_path / "page.html")
    assert [title.text for title in shown.select("h1")] == list(hybrid_search.QUESTIONS)
    assert not shown.select("[src]")
    assert all(link["href"].startswith("#") for link in shown.select("[href]"))
    assert not re.search(r"https?://|url\(|@import", text)
    ids = [element["id"] for element in shown.select("[id]")]
    assert len(ids) == len(set(ids)) == len(hybrid_search.QUESTIONS)


def test_the_small_model_is_not_taken_for_bge_m3(model, handbook_db, tmp_path, monkeypatch):
    monkeypatch.setattr("small_model.build", lambda: model.model)
    path = tmp_path / "page.html"
    options = ["--small", "--db", str(handbook_db), "--query", "x", "--html", str(path)]
    assert hybrid_search.main(options) == 0
    assert "Model: a small model for demonstrations, not BGE-M3." in page(path).footer.text


@pytest.mark.parametrize(
    ("width", "stacked"),
    [
        (30, ["DENSE", "LEXICAL", "FUSED", "WITH"]),
        (80, ["DENSE", "FUSED"]),
        (100, ["DENSE"]),
        (200, ["DENSE"]),
    ],
)
def test_all_lines_fit_the_terminal(run, width, stacked):
    lines = run("--query", PART, width=width).out.splitlines()[1:]
    assert all(cell_len(line) <= min(width, 140) for line in lines)
    firsts = [line.split()[0] for line in lines if re.match("(DENSE|LEXICAL|FUSED|WITH) ?", line)]
    assert firsts == stacked


def test_a_terminal_gets_bold_instead_of_brackets(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    bold = run("--query", PART, stream=Terminal).out
    assert "part: \x1b[1;4mVS-2208-K\x1b[0m · name: Valve \x1b[1;4mseal\x1b[0m, EPDM" in bold
    monkeypatch.setenv("NO_COLOR", "1")
    assert (
        "part: [VS-2208-K] · name: Valve [seal], EPDM" in run("--query", PART, stream=Terminal).out
    )


def test_chinese_words_are_marked(run, folder, tmp_path, tiny_checkpoint):
    (folder / "a.txt").write_text("今天天气很好,我们去公园散步。" * 8 + "意思相近的是稠密向量!")
    (folder / "b.txt").write_text("人人有权享有生命。")
    options = {"documents": folder, "db": tmp_path / "db", "model": tiny_checkpoint}
    ran = run("--query", "稠密向量", "--html", tmp_path / "page.html", width=60, **options)
    assert ran.status == 0
    assert re.search(r"^  … .*\n.*\n.*是\[稠密向量\]!$", ran.out, re.MULTILINE)
    assert all(cell_len(line) <= 60 for line in ran.out.splitlines())
    assert {mark.text for mark in page(tmp_path / "page.html").select(".text mark")} == {"稠密向量"}


def test_errors_are_one_line(run, folder, tmp_path):
    (folder / "a.txt").write_text("A seal.")
    headless = build(tmp_path / "headless", with_heads=False)
    for message, options, places in [
        ("-k is 0. ", ["-k", 0], {}),
        ("The question is empty", ["--query", " "], {}),
        (f"--html {tmp_path} is a folder", ["--html", tmp_path], {}),
        (f"--html {tmp_path}/no/p.html is a", ["--html", tmp_path / "no/p.html"], {}),
        ("There is no folder", [], {"documents": tmp_path / "missing"}),
        ("", [], {"model": headless, "documents": folder, "db": tmp_path / "db"}),
    ]:
        ran = run("--query", "x", *options, **places)
        assert (ran.status, ran.out) == (2, "")
        line = ran.err.splitlines()[-1]
        assert line.startswith(f"Error: {message}")
    assert "sparse_linear.pt" in line


def test_a_mark_goes_on_in_the_next_line():
    styled = Console(force_terminal=True, color_system="standard", no_color=False)
    text = marked(styled, "意思稠密向量检索", [Mark(2, 6, 1.0)])
    lines = text.divide([4])
    assert [[span.style.bold for span in line.spans] for line in lines] == [[True], [True]]


def test_the_lines_shown_are_those_with_the_strongest_matches():
    plain = Console(color_system=None)
    text = "seal " + "word " * 100 + "shelf seal " + "word " * 100
    marks = [Mark(0, 4, 0.3), Mark(505, 510, 0.4), Mark(511, 515, 0.3)]
    lines = best_lines(list(marked(plain, text, marks).divide(range(50, len(text), 50))))
    assert len(lines) == 3
    assert "[shelf] [seal]" in "".join(line.plain for line in lines)
    assert lines[0].plain.startswith("… ")
    assert lines[-1].plain.endswith(" …")
    assert best_lines([Text("one")])[0].plain == "one"


def test_letters_count_on_after_z():
    assert [lettered(number) for number in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]
