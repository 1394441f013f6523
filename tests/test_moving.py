"""docs/moving.md: what it writes before and after gives the same vectors, run as printed."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_chroma import Chroma
from model_server import served
from scipy.sparse import csr_array

from langchain_bge_dense._engine.flag import flag_model_class

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from langchain_bge_dense import BGEM3Embeddings

PAGE = (Path(__file__).parents[1] / "docs" / "moving.md").read_text("utf-8")
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
SNIPPETS = {title: SNIPPET.findall(text) for title, text in SECTION.findall(PAGE)}
SERVERS = ("http://127.0.0.1:8000", "http://127.0.0.1:8080")  # ours, and TEI's in whose place it is
TEXTS = [
    "All human beings are born free.",
    "What is a dense\nvector?",
    "人人生而自由。",
    "free " * 90,
]


@pytest.fixture(scope="module")
def url(tiny: BGEM3Embeddings) -> Iterator[str]:
    with served(tiny) as url:
        yield url


@pytest.fixture
def _flagembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class alone, where this transformers breaks the rest of FlagEmbedding."""
    try:
        import FlagEmbedding  # noqa: F401
    except ImportError:
        package = SimpleNamespace(
            BGEM3FlagModel=flag_model_class(), __spec__=ModuleSpec("FlagEmbedding", None)
        )
        monkeypatch.setitem(sys.modules, "FlagEmbedding", package)


@pytest.fixture
def run(
    tiny_checkpoint: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    _flagembedding: None,
) -> Iterator[Any]:
    """Runs a snippet of the page with the tiny model in the place of BGE-M3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", url)

    def run(code: str) -> dict[str, Any]:
        model = f'model={str(tiny_checkpoint)!r}, device="cpu", dtype="float32"'
        code = code.replace("BGEM3Embeddings()", f"BGEM3Embeddings({model})")
        if "client" not in code:  # of TEI, which does not look at the name
            code = code.replace('"BAAI/bge-m3"', repr(str(tiny_checkpoint)))
        for server in SERVERS:
            code = code.replace(server, url)
        names: dict[str, Any] = {"texts": TEXTS}
        exec(compile(code, "moving.md", "exec"), names)  # noqa: S102
        made.append(names.get("embeddings"))
        return names

    made: list[Any] = []
    yield run
    for embeddings in made:
        kind = type(embeddings).__name__
        if kind == "OllamaEmbeddings":
            embeddings._client._client.close()
        elif kind == "HuggingFaceEndpointEmbeddings":
            embeddings.client.close()


def assert_equal(one: Any, other: Any) -> None:
    ours, theirs = (np.asarray(vectors, np.float32) for vectors in (one, other))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5


def dicts(weights: Any) -> list[Mapping[int, float]]:
    """Lexical weights as here, from those of FlagEmbedding or Milvus."""
    if isinstance(weights, list):
        return [{int(token): float(weight) for token, weight in each.items()} for each in weights]
    rows = csr_array(weights)
    return [
        dict(zip(rows[[n]].indices.tolist(), rows[[n]].data.tolist(), strict=True))
        for n in range(rows.shape[0])
    ]


@pytest.mark.parametrize("title", [title for title in SNIPPETS if title != "A Chroma collection"])
def test_before_and_after_are_equal(title: str, run: Any) -> None:
    before, *afters = map(run, SNIPPETS[title])
    assert len(before["vectors"]) == len(TEXTS)
    assert afters
    for after in afters:
        assert_equal(after["vectors"], before["vectors"])
        if "weights" in before:
            for one, other in zip(*map(dicts, (after["weights"], before["weights"])), strict=True):
                assert one == pytest.approx(other, abs=1e-5)
        if "colbert" in before:
            for one, other in zip(after["colbert"], before["colbert"], strict=True):
                assert_equal(one, other)


def test_the_collection_and_its_scores(run: Any, tmp_path: Path) -> None:
    """A distance is half of the one in l2; the relevance is the cosine."""
    embeddings = run(SNIPPETS["HuggingFaceEmbeddings"][0])["embeddings"]
    # Chroma takes a relative path for the folder of this name that it has opened before.
    plain = Chroma("notes", embeddings, persist_directory=str(tmp_path / "db"))
    plain.add_texts(TEXTS)
    query = "a dense vector"
    halved = {d.page_content: s / 2 for d, s in plain.similarity_search_with_score(query)}
    [snippet] = SNIPPETS["A Chroma collection"]
    with run(snippet)["store"] as store:
        assert store.lexical
        found = {d.page_content: s for d, s in store.similarity_search_with_score(query)}
        assert found == pytest.approx(halved, abs=1e-5)
        relevance = store.similarity_search_with_relevance_scores(query)
        assert {d.page_content: 1 - s for d, s in relevance} == pytest.approx(halved, abs=1e-5)
