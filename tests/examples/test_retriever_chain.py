"""The main example, run as its user runs it: in a process of its own, and through `main`."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import retriever_chain
from command_line import converse
from folder_index import HANDBOOK, SECTION, sections, split
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, SimpleChatModel
from langchain_core.runnables import RunnableLambda
from retriever_chain import QUESTIONS, answer_chain, answerer, load_chat_model, main
from small_model import default_folder

SCRIPT = Path(retriever_chain.__file__)
ANSWERED_BY = {
    "Why are my relevance scores negative?": "troubleshooting.csv, row 3",
    "How long should a passage be?": "chunking.md",
    "How much disk space do a million vectors need?": "speed-and-memory.pdf, page 3",
    "Which figure rewards a right answer at the top of the list?": "evaluation.html",
    "How do I merge the results of keyword search and dense search?": "hybrid-search.txt",
    "What is a cross-encoder?": "glossary.json#/2",
    "稠密向量是什么？": "retrieval-basics.md",
    "为什么相似度是负数？": "faq.csv, row 3",
    "My process was killed while indexing": "troubleshooting.csv, row 5",
    "Which heating element fits my kettle?": "workshop-parts.csv, row 3",
    "Where do old passages go after a document changed?": "vector-stores.md",
}


class Ran(NamedTuple):
    """What a run of `main` gave."""

    status: int
    out: str
    err: str

    @property
    def first(self):
        """Place of the best passage."""
        return re.search(r"^ 1  0\.\d\d  (.*)$", self.out, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def handbook_db(tmp_path_factory):
    return tmp_path_factory.mktemp("handbook")


@pytest.fixture
def run(small_checkpoint, handbook_db):
    """Run `main` on the small model; on the handbook where nothing else is said."""

    def run(*options, documents=HANDBOOK, db=handbook_db, model=small_checkpoint):
        places = ["--model", str(model), "--documents", str(documents), "--db", str(db)]
        out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*places, *map(str, options)])
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return Ran(status, *texts)

    return run


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "bees.md").write_text("Bees make honey from nectar and store it in combs.")
    (folder / "trains.txt").write_text("Express trains do not stop at small stations.")
    (folder / "stars.csv").write_text("star,colour\nBetelgeuse,red\nRigel,blue\n")
    return folder


def test_the_demo_answers_its_questions_without_a_terminal(tmp_path, small_checkpoint):
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--small", "--db", tmp_path / "db"],
        env=environment(tmp_path, small_checkpoint),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = dict(re.findall(r"^> (.*)\n 1  0\.\d\d  ..?/(.*)$", ran.stdout, re.MULTILINE))
    *answered, foreign = QUESTIONS
    assert answers == {question: ANSWERED_BY[question] for question in answered}
    assert (
        f"> {foreign}\nNo passage seems to answer this. The nearest one is:\n 1  0." in ran.stdout
    )
    note, result = told(ran.stderr)
    assert note.startswith("A small model")
    assert re.fullmatch(r".*/documents: (\d+) passages, \1 new, 0 removed", result)


def told(err):
    """Lines of standard error but those on progress."""
    return [
        line for line in err.splitlines() if not re.match(r"Reading: |Indexing: |Loading |$", line)
    ]


def environment(tmp_path, small_checkpoint):
    """Variables for a process whose cache holds the small model already."""
    cache = tmp_path / "cache"
    (cache / "langchain-bge-dense").mkdir(parents=True)
    (cache / "langchain-bge-dense" / default_folder().name).symlink_to(small_checkpoint)
    root = str(SCRIPT.parent.parent)
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": root, "COLUMNS": "100"}


def test_a_conversation_on_a_terminal(tmp_path, small_checkpoint):
    with conversation(tmp_path, small_checkpoint) as (process, terminal):
        read_until(terminal, "> ")
        os.write(terminal, b"What is a cross-encoder?\n")
        assert "glossary.json#/2" in read_until(terminal, "\r\n\r\n> ")
        os.write(terminal, "稠密向量是什么？\n".encode())
        assert "zh/retrieval-basics.md" in read_until(terminal, "\r\n\r\n> ")
        assert interrupted(process) == 0
        assert read_until(terminal, "").strip() == ""
    assert (tmp_path / "cache" / "langchain-bge-dense" / "retriever_chain").is_dir()


@contextlib.contextmanager
def conversation(tmp_path, small_checkpoint):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--small"],
        env=environment(tmp_path, small_checkpoint),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def interrupted(process):
    """Press Ctrl-C; again where it fell between Python's prompt and its wait for a line."""
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(5)
    return None


def read_until(terminal, end):
    """Read a terminal until it shows `end`; with an empty one, until it is closed."""
    shown = b""
    while not (end and shown.decode(errors="ignore").endswith(end)):
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux reports a closed terminal so
            part = b""
        if not part:
            break
        shown += part
    return shown.decode()


@pytest.mark.parametrize("question", [q for q in ANSWERED_BY if q not in QUESTIONS])
def test_the_right_passage_comes_first(run, question):
    ran = run("--query", question)
    assert ran.status == 0
    assert ran.first.endswith(f"/{ANSWERED_BY[question]}")


@pytest.mark.parametrize(
    ("question", "answered"),
    [
        ("How do I bake bread?", False),
        ("哪种酒配鱼？", False),
        ("How long should a passage be?", True),
        ("段落应该多长？", True),
    ],
)
def test_a_question_that_nothing_answers_looks_like_one(run, question, answered):
    ran = run("--query", question)
    assert ("No passage seems to answer this." in ran.out) != answered
    assert len(re.findall(r"^ \d  0\.\d\d  ", ran.out, re.MULTILINE)) == (4 if answered else 1)


def test_of_a_model_without_measured_scores_nothing_is_said(run, folder, tmp_path, tiny_checkpoint):
    places = {"documents": folder, "db": tmp_path / "db", "model": tiny_checkpoint}
    assert "No passage" not in run("--query", "Which wine goes with fish?", **places).out


def test_a_second_run_embeds_nothing(run, folder, tmp_path):
    first = run("--query", "bees", documents=folder, db=tmp_path / "db")
    again = run("--query", "bees", documents=folder, db=tmp_path / "db")
    assert first.err.endswith(f"{folder}: 4 passages, 4 new, 0 removed\n")
    assert again.err.endswith(f"{folder}: 4 passages, 0 new, 0 removed\n")
    assert first.out == again.out


def test_changed_and_deleted_files(run, folder, tmp_path):
    run("--query", "bees", documents=folder, db=tmp_path / "db")
    (folder / "bees.md").write_text("Bees sting when their hive is in danger.")
    (folder / "stars.csv").unlink()
    ran = run("--query", "honey", "-k", 9, documents=folder, db=tmp_path / "db")
    assert ran.err.endswith("2 passages, 1 new, 3 removed\n")
    assert "honey from" not in ran.out
    assert "hive is in danger" in ran.out


def test_an_unreadable_file_is_reported_and_its_passages_stay(run, folder, tmp_path, caplog):
    run("--query", "bees", documents=folder, db=tmp_path / "db")
    (folder / "stars.csv").write_bytes(b"\xff\xfe")
    ran = run("--query", "Which star is red?", documents=folder, db=tmp_path / "db")
    assert "stars.csv cannot be read: it is not UTF-8" in caplog.text
    assert ran.status == 0
    assert ran.first == "stars.csv, row 1"


def test_two_folders_in_one_database_keep_apart(run, folder, tmp_path):
    run("--query", "bees", documents=folder, db=tmp_path / "db")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert "4 new, 0 removed" in run("--query", "x", documents=other, db=tmp_path / "db").err
    assert "0 new, 0 removed" in run("--query", "x", documents=folder, db=tmp_path / "db").err


def test_k_is_the_number_of_passages(run):
    ran = run("--query", "What is recall?", "-k", 2)
    assert re.findall(r"^ (\d)  ", ran.out, re.MULTILINE) == ["1", "2"]


def test_errors_are_one_line(run, folder, tmp_path, handbook_db, tiny_checkpoint):
    (tmp_path / "file").write_text("")
    run("--query", "x")
    for message, options, places in [
        ("-k is 0. ", ["-k", 0], {}),
        ("The question is empty", ["--query", " "], {}),
        ("There is no folder", [], {"documents": tmp_path / "missing"}),
        ("There is no model folder", [], {"model": tmp_path / "missing"}),
        (f"{handbook_db} cannot be used; give another", [], {"model": tiny_checkpoint}),
        (f"{tmp_path}/file cannot be used", [], {"documents": folder, "db": tmp_path / "file"}),
        ("--llm nonsense: ValueError: Unable to infer", ["--llm", "nonsense"], {}),
    ]:
        ran = run("--query", "x", *options, **places)
        assert ran.status == 2
        assert ran.out == ""
        [line] = told(ran.err)
        assert line.startswith(f"Error: {message}")


class Echo(SimpleChatModel):
    """A chat model that answers with what it was asked."""

    @property
    def _llm_type(self):
        return "echo"

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        return "\n".join(message.content for message in messages)


PASSAGES = [
    Document("one", metadata={"source": "a.pdf", "page": 2, "bge_m3_dense_score": 0.5}),
    Document("two", metadata={"source": "b.csv", "row": 7, "bge_m3_dense_score": 0.4}),
]
RETRIEVER = RunnableLambda(lambda _: PASSAGES)


def test_the_chat_model_gets_numbered_passages_and_the_question():
    result = answer_chain(RETRIEVER, Echo()).invoke("why?")
    assert "Answer from the numbered passages" in result["answer"]
    assert (
        "[1] (a.pdf, page 2)\none\n\n[2] (b.csv, row 7)\ntwo\n\nQuestion: why?" in result["answer"]
    )
    assert result["passages"] == PASSAGES


def test_braces_in_a_passage_are_text():
    retriever = RunnableLambda(lambda _: [Document("{x} {", metadata={"source": "a"})])
    assert "{x} {" in answer_chain(retriever, Echo()).invoke("{y}")["answer"]


def test_an_answer_is_shown_with_its_sources(capsys):
    model = FakeListChatModel(responses=["Because of l2 [1].\x1b[31m"])
    answerer(RETRIEVER, model)("why?")
    assert capsys.readouterr().out == (
        "Because of l2 [1]. [31m\n\n[1] 0.50  a.pdf, page 2\n[2] 0.40  b.csv, row 7\n\n"
    )


def test_an_error_of_the_chat_model_does_not_end_the_conversation(monkeypatch, capsys):
    def fail(_):
        raise LookupError

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    converse(answerer(RETRIEVER, RunnableLambda(fail)), "why?")
    _, *errors = capsys.readouterr().err.splitlines()
    assert errors == ["Error: No answer: LookupError: LookupError"] * 2


def test_the_command_line_loads_a_chat_model_and_shows_its_answer(run, monkeypatch):
    class ChatOllama(Echo):
        model: str

        @property
        def _llm_type(self):
            return self.model

    package = SimpleNamespace(ChatOllama=ChatOllama, __spec__=ModuleSpec("langchain_ollama", None))
    monkeypatch.setitem(sys.modules, "langchain_ollama", package)
    assert load_chat_model("ollama:llama3.1")._llm_type == "llama3.1"
    ran = run("--query", "What is a cross-encoder?", "-k", 2, "--llm", "ollama:llama3.1")
    assert "Question: What is a cross-encoder?" in ran.out
    assert re.search(r"^\[1\] 0\.\d\d  en/glossary\.json#/2$", ran.out, re.MULTILINE)


def test_a_missing_provider_is_named():
    with pytest.raises(ValueError, match="langchain-anthropic"):
        load_chat_model("anthropic:claude-sonnet-4-0")


def test_scores_are_cosines(run, folder, tmp_path, prompted):
    (folder / "cat.txt").write_text("a cat")
    ran = run("--query", "a cat", documents=folder, db=tmp_path / "db")
    cosine = np.dot(prompted.embed_query("a cat"), prompted.embed_documents(["a cat"])[0])
    assert ran.out.startswith(f"> a cat\n 1  {cosine:.2f}  cat.txt\n")
    assert float(re.search(r"^ 2  (\S+)", ran.out, re.MULTILINE)[1]) < cosine


def test_passages_fit_the_budget_and_end_at_sentences(small):
    text = "向量检索很有用。它按意思找文字！真的吗？是的；" * 60
    passages = list(split([Document(text, metadata={"source": "a.md", "page": 3})], small))
    assert all(100 < small.count_tokens(p.page_content) <= 150 for p in passages[:-1])
    assert all(p.page_content[-1] in "。！？；" for p in passages)
    assert all(p.metadata == {"source": "a.md", "page": 3} for p in passages)


def document_of(words):
    text = "Words about it. " * words
    part = f"## Part\n\n### Sub\n\n{text}\n\n{text}"
    return Document(f"# All\n\n{part}\n\n{part}\n\n{part}\n\n{part}")


@pytest.mark.parametrize("words", [5, 9, 200])
def test_headings_stay_with_their_text(small, words):
    passages = split([document_of(words)], small)
    assert all("Words" in passage.page_content.splitlines()[-1] for passage in passages)


def test_sections_that_fit_are_passages(small):
    passages = split([document_of(9)], small)
    assert [passage.page_content.count("## Part") for passage in passages] == [1, 1, 1, 1]


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", ""])
def test_a_large_text_is_split_section_by_section(gap):
    text = f"word word word.{gap}" * 20_000
    parts = list(sections(text))
    assert len(parts) > 2
    assert "".join(parts) == text
    assert all(len(part) <= SECTION for part in parts)
    assert all(part.startswith(gap) for part in parts[1:])


def test_a_large_file_shows_that_it_is_read(run, folder, tmp_path):
    (folder / "large.txt").write_text("Bees make honey from nectar. " * 4_000)
    ran = run("--query", "bees", documents=folder, db=tmp_path / "db")
    assert "Splitting large.txt: 116,000 characters." in ran.err


def test_the_default_database_says_which_option_changes_it(
    folder, tmp_path, small_checkpoint, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--model", str(small_checkpoint), "--documents", str(folder), "--query", "bees"]
    assert main(options) == 0
    assert f"Database: {tmp_path}/cache/" in (shown := capsys.readouterr().err)
    assert "--db" in shown
    assert main([*options, "--db", str(tmp_path / "db")]) == 0
    assert "Database" not in capsys.readouterr().err
