"""The search page, served by two processes over one model server, fetched and in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote_plus

import httpx
import pytest
import web_app
from bs4 import BeautifulSoup
from fastapi.testclient import TestClient
from folder_index import open_collection
from langchain_core.documents import Document
from model_server import HOST, START_SECONDS, ModelServer, free_port, served

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="there, workers do not end with the process that started them"
)

SCRIPT = Path(__file__).parents[2] / "examples" / "web_app.py"
HOSTILE = '<script>alert("seal")</script> &amp; <b>a seal</b>'
DOCUMENTS = {
    "parts.txt": "The seal VS-2208-K lies on shelf 14.",
    "bees.txt": "Bees make honey of nectar.",
    "<i>odd.txt": HOSTILE,
}
QUESTION = "Which shelf has the seal VS-2208-K?"
WORKERS = 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ALONE = [  # nothing but the page, and nothing kept
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    "--enable-logging=stderr",
]


class Site(NamedTuple):
    """The page, and the processes that serve it."""

    url: str
    starter: int
    workers: set[int]

    def get(self, question: str) -> BeautifulSoup:
        """The page as a browser gets it."""
        reply = httpx.get(self.url, params={"q": question}, timeout=60, trust_env=False)
        assert reply.status_code == 200
        return BeautifulSoup(reply.text, "html.parser")


def process(page: BeautifulSoup) -> int:
    return int(re.search(r"Answered by process (\d+)\.", page.footer.text)[1])


@pytest.fixture(scope="module")
def site(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("web_app")
    (folder / "documents").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "documents" / name).write_text(text)
    model = ("--model", str(small_checkpoint), "--dtype", "float32", "--device", "cpu")
    with ModelServer(folder, *model) as server:
        options = {
            "--server": server.base_url,
            "--documents": folder / "documents",
            "--db": folder / "db",
            "--port": (port := free_port()),
            "--workers": WORKERS,
        }
        command = [sys.executable, SCRIPT, *(part for pair in options.items() for part in pair)]
        with (folder / "web_app.log").open("wb") as log:
            started = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        try:
            workers = find_workers(started, url := f"http://{HOST}:{port}/")
            yield Site(url, started.pid, workers)
        finally:
            started.terminate()
            started.wait(START_SECONDS)
            told = (folder / "web_app.log").read_text()
        assert "Traceback" not in told, told
        assert [worker for worker in workers if lives(worker)] == []


def find_workers(started: subprocess.Popen[bytes], url: str) -> set[int]:
    """Process ids of all workers, once they answer."""
    found: set[int] = set()

    def ask(_: int) -> None:
        try:
            reply = httpx.get(url, timeout=60, trust_env=False)
            found.add(process(BeautifulSoup(reply.text, "html.parser")))
        except httpx.TransportError:
            time.sleep(0.1)

    until = time.monotonic() + 2 * START_SECONDS
    with ThreadPoolExecutor(8) as pool:
        while len(found) < WORKERS:
            assert started.poll() is None
            assert time.monotonic() < until, found
            list(pool.map(ask, range(16)))
    return found


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_several_processes_answer_and_none_has_a_model(site: Site) -> None:
    assert len(site.workers) == WORKERS
    assert site.starter not in site.workers
    for pid in site.workers if sys.platform == "linux" else ():
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_page_shows_what_the_retriever_finds_and_marks_why(
    site: Site, small: BGEM3Embeddings
) -> None:
    page = site.get(QUESTION)
    assert not page.select("[role=status]")
    first = page.select_one(".m3-matches section")
    assert first.header.b.text == "1  parts.txt"
    assert [mark.text for mark in first.select(".text mark")] == ["seal", "VS-2208-K", "shelf"]
    assert page.select_one("input[name=q]")["value"] == QUESTION
    unanswered = site.get("Which wine goes with fish?").select_one("[role=status]")
    assert unanswered.text == "No passage seems to answer this."
    for name in ("Fused", "ColBERT"):  # what stands beside a passage is explained below
        assert name in first.text
        assert re.search(rf"^{name}\b.*: .*\.$", page.footer.text, re.MULTILINE)
    store = open_chroma(small, "same", lexical=True)
    index_documents(store, [Document(text) for text in DOCUMENTS.values()])
    found = BGEM3Retriever(vectorstore=store, k=5).invoke(QUESTION)
    shown = [passage.text for passage in page.select("section .text")]
    assert shown == [passage.page_content for passage in found]
    store.close()


def test_what_documents_and_questions_hold_is_text(site: Site) -> None:
    query = 'a "seal" <img src=x onerror=alert(1)>'
    page = site.get(query)
    assert not page.select("script, img, .text b, header i")
    assert page.title.text == page.select_one("input[name=q]")["value"] == query
    assert HOSTILE in [passage.text for passage in page.select("section .text")]


def test_without_a_question_there_is_a_form_alone(site: Site) -> None:
    for question in ("", "  "):
        page = site.get(question)
        assert page.form.button.text == "Search"
        assert not page.select(".m3-matches, [role=alert]")


def test_an_error_is_said_on_the_page(
    small: BGEM3Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_collection(small, tmp_path / "db", tmp_path)) as store:
        index_documents(store, [Document("A seal.")], lexical=True)
    with served(small, max_queue=0) as url:  # it refuses every text
        options = {"server": url, "small": False, "documents": tmp_path, "db": tmp_path / "db"}
        monkeypatch.setenv(web_app.OPTIONS, json.dumps({**options, "k": 5}, default=str))
        reply = TestClient(web_app.create_app()).get("/", params={"q": "seal"})
    assert reply.status_code == 503
    page = BeautifulSoup(reply.text, "html.parser")
    assert page.select_one("[role=alert]").text.startswith("The queue is full: 0 requests wait")
    assert page.select_one("input[name=q]")["value"] == "seal"


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"None of {', '.join(BROWSERS)} is installed.")
    return found


def test_a_browser_shows_the_page_as_it_is_sent(site: Site, browser: str, tmp_path: Path) -> None:
    url = f"{site.url}?q={quote_plus(QUESTION)}"
    profile, picture = f"--user-data-dir={tmp_path / 'profile'}", tmp_path / "page.png"
    shown = run(browser, *ALONE, profile, "--dump-dom", url)
    assert "CONSOLE" not in shown.stderr  # such as a style that the page's own policy refuses
    page, sent = BeautifulSoup(shown.stdout, "html.parser"), site.get(QUESTION)
    assert page.select_one(".m3-matches").text == sent.select_one(".m3-matches").text
    assert process(page) in site.workers
    run(browser, *ALONE, profile, f"--screenshot={picture}", url)
    assert picture.read_bytes().startswith(b"\x89PNG")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
