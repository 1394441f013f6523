"""Any order of changes, kills and searches against a plain dictionary, scored by brute force."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from chroma_server import ChromaServer
from chromadb.api.client import Client
from chromadb.api.models.Collection import Collection
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from tenacity import wait_fixed

from langchain_bge_dense import BGEM3Reranker, BGEM3Retriever
from langchain_bge_dense._scoring import maxsim_scores
from langchain_bge_dense.chroma import compact, hnsw, index_documents, open_chroma
from langchain_bge_dense.chroma.folder import Folder
from langchain_bge_dense.chroma.session import RETRYING
from langchain_bge_dense.chroma.signals import FolderSignals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_bge_dense import BGEM3Embeddings

WORDS = ["free", "equal", "rights", "vector", "query", "passage"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
IDS = st.sampled_from("abcdef")
DOCUMENTS = st.dictionaries(IDS, TEXTS, min_size=1, max_size=4)

STEPS = [
    (Client, "create_collection"),
    (Client, "delete_collection"),
    (Collection, "modify"),
    (Folder, "write"),
    (FolderSignals, "put"),
    (FolderSignals, "delete"),
    (FolderSignals, "keep_only"),
    (hnsw, "back_up"),
    (hnsw, "drop_backup"),
]


@contextmanager
def copied_before(number: int, source: Path, target: Path) -> Iterator[None]:
    """Copy a folder before a step of what is written to it, as a kill would leave it."""
    steps = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args, **options):
            if next(steps) == number:
                shutil.copytree(source, target)
            return call(*args, **options)

        return step

    with ExitStack() as stack:
        for owner, name in STEPS:
            step = counted(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, step))
        yield


class AnyOrder(RuleBasedStateMachine):
    """A store, and the texts by id that it has to hold."""

    embeddings: ClassVar[BGEM3Embeddings]
    place: ClassVar[dict[str, Any]] = {}
    lexical: ClassVar[bool] = True
    server: ClassVar[ChromaServer | None] = None
    away = 0

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folder = None if self.place else self.root / "0"
        self.model: dict[str, str] = {}
        self.indexed: set[str] = set()
        self.records = InMemoryRecordManager("any")
        self.records.create_schema()

    @initialize()
    def begin(self) -> None:
        self.store = self.opened()
        self.store.reset_collection()

    def opened(self):
        place = self.place or {"persist_directory": self.folder}
        colbert = "int8" if self.lexical else None
        often = {"hnsw": {"sync_threshold": 3, "batch_size": 3}}  # the index is persisted
        return open_chroma(
            self.embeddings,
            "any-order",
            lexical=self.lexical,
            colbert=colbert,
            collection_configuration=often,
            **place,
        )

    @rule(documents=DOCUMENTS)
    def add(self, documents: dict[str, str]) -> None:
        self.store.add_texts(list(documents.values()), ids=list(documents))
        self.model |= documents

    @rule(text=TEXTS, count=st.integers(15, 25))
    def add_repeated(self, text: str, count: int) -> None:
        """More equal passages than an element of Chroma's graph has neighbours by itself."""
        documents = dict.fromkeys((f"repeated {number}" for number in range(count)), text)
        self.store.add_texts(list(documents.values()), ids=list(documents))
        self.model |= documents

    @rule(documents=DOCUMENTS)
    def add_by_index_documents(self, documents: dict[str, str]) -> None:
        new = {k: v for k, v in documents.items() if self.model.get(k) != v}
        done = index_documents(self.store, [Document(v, id=k) for k, v in documents.items()])
        assert (done.added, done.skipped) == (len(new), len(documents) - len(new))
        self.model |= documents

    @rule(documents=DOCUMENTS)
    def update(self, documents: dict[str, str]) -> None:
        self.store.update_documents(list(documents), list(map(Document, documents.values())))
        self.model |= {k: v for k, v in documents.items() if k in self.model}

    @rule(ids=st.sets(IDS))
    def delete(self, ids: set[str]) -> None:
        self.store.delete(sorted(ids))
        self.model = {k: v for k, v in self.model.items() if k not in ids}

    @rule(texts=st.sets(TEXTS, min_size=1, max_size=3))
    def langchain_index(self, texts: set[str]) -> None:
        before = set(self.store.get()["ids"])
        documents = [Document(text, metadata={"source": text}) for text in sorted(texts)]
        options = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
        index(documents, self.records, self.store, **options)
        stored = self.store.get()
        after = dict(zip(stored["ids"], stored["documents"], strict=True))
        kept = {k: v for k, v in self.model.items() if k not in self.indexed}
        self.indexed = after.keys() - kept.keys()
        assert {after[k] for k in self.indexed} == texts
        assert before - after.keys() <= self.model.keys()
        self.model = {**kept, **{k: after[k] for k in self.indexed}}

    @rule()
    def compact(self) -> None:
        assert compact(self.store).passages == len(self.model)

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = self.opened()

    @precondition(lambda self: self.folder)
    @rule()
    def folder_is_removed(self) -> None:
        shutil.rmtree(self.folder)
        self.store = self.opened()
        self.model, self.indexed = {}, set()
        self.records = InMemoryRecordManager("any")
        self.records.create_schema()

    @precondition(lambda self: self.server and self.away < 2)
    @rule(query=TEXTS)
    def server_goes_away_and_comes_back(self, query: str) -> None:
        self.away += 1
        self.server.stop()
        starting = threading.Timer(0.2, self.server.start)
        starting.start()
        self.search(query)
        starting.join()

    @precondition(lambda self: self.folder)
    @rule(documents=DOCUMENTS, step=st.integers(0, 12))
    def killed_while_it_adds(self, documents: dict[str, str], step: int) -> None:
        former, copy = dict(self.model), self.next_folder()
        with copied_before(step, self.folder, copy):
            self.add(documents)
        self.go_on_in(copy, former)

    @precondition(lambda self: self.folder)
    @rule(step=st.integers(0, 20))
    def killed_while_it_compacts(self, step: int) -> None:
        copy = self.next_folder()
        with copied_before(step, self.folder, copy):
            self.compact()
        self.go_on_in(copy, self.model)

    def next_folder(self) -> Path:
        return self.root / str(int(self.folder.name) + 1)

    def go_on_in(self, copy: Path, former: dict[str, str]) -> None:
        """Take the place of a killed process, which has written all of a batch or nothing."""
        if copy.exists():
            self.store.close()
            shutil.rmtree(self.folder)
            self.folder, self.store = copy, None
            self.store = self.opened()
            found = self.store.get()
            texts = dict(zip(found["ids"], found["documents"], strict=True))
            assert texts in (former, self.model)
            self.model = texts
            self.search(" ".join(WORDS))

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def holds_the_documents(self) -> None:
        found = self.store.get()
        assert dict(zip(found["ids"], found["documents"], strict=True)) == self.model

    @rule(query=TEXTS)
    def search(self, query: str) -> None:
        dense, lexical = self.brute_force(query)
        nearest = self.store.similarity_search_with_score(query, k=100)
        assert {d.id: pytest.approx(1 - score, abs=1e-3) for d, score in nearest} == dense
        if self.lexical:
            self.search_by_both(query, dense, lexical)

    def search_by_both(
        self, query: str, dense: dict[str, float], lexical: dict[str, float]
    ) -> None:
        retriever = BGEM3Retriever(vectorstore=self.store, k=100, scores=True)
        found = {d.id: d.metadata for d in retriever.invoke(query)}  # a warning is an error
        colbert = self.embeddings.encode([query], colbert=True).colbert[0]
        passages = self.embeddings.encode(list(self.model.values()), colbert=True)
        expected = dict(zip(self.model, maxsim_scores(colbert, passages.colbert), strict=True))
        assert {
            k: pytest.approx(m["bge_m3_colbert_score"], abs=1e-2) for k, m in found.items()
        } == expected
        assert {k: pytest.approx(m["bge_m3_dense_score"], abs=1e-3) for k, m in found.items()} == (
            dense
        )
        assert {
            k: pytest.approx(m["bge_m3_lexical_score"], abs=1e-3) for k, m in found.items()
        } == lexical
        documents = [Document(text, id=passage) for passage, text in self.model.items()]
        reranker = BGEM3Reranker(vectorstore=self.store, weights=(1, 1, 0))
        ranked = {d.id: d.metadata for d in reranker.compress_documents(documents, query)}
        for signal, scores in (("dense", dense), ("lexical", lexical)):
            given = {
                k: pytest.approx(m[f"bge_m3_{signal}_score"], abs=1e-3) for k, m in ranked.items()
            }
            assert given == scores
        by_words = BGEM3Retriever(vectorstore=self.store, k=3, weights=(0, 1, 0), scores=True)
        ranked = [d.metadata["bge_m3_lexical_score"] for d in by_words.invoke(query)]
        best = sorted(lexical.values(), reverse=True)[:3]
        np.testing.assert_allclose(ranked, best, atol=1e-3)

    def brute_force(self, query: str) -> tuple[dict[str, float], dict[str, float]]:
        asked = self.embeddings.encode([query], lexical=True)
        rows = self.embeddings.encode(list(self.model.values()), lexical=True)
        dense = dict(zip(self.model, (rows.dense @ asked.dense[0]).tolist(), strict=True))
        [words] = asked.lexical
        lexical = {
            passage: sum(words[t] * row[t] for t in words.keys() & row.keys())
            for passage, row in zip(self.model, rows.lexical, strict=True)
        }
        return dense, lexical

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.root)


def run(machine: type[AnyOrder], examples: int) -> None:
    options = settings(
        max_examples=examples,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase.settings = options
    machine.TestCase("runTest").runTest()


@pytest.mark.parametrize(("lexical", "examples"), [(True, 40), (False, 10)])
def test_local(tiny, lexical, examples):
    run(type("Local", (AnyOrder,), {"embeddings": tiny, "lexical": lexical}), examples)


@pytest.mark.parametrize(("lexical", "examples"), [(True, 6), (False, 3)])
def test_on_a_server(tiny, tmp_path, monkeypatch, lexical, examples):
    monkeypatch.setattr(RETRYING, "wait", wait_fixed(0.1))
    with ChromaServer(tmp_path / "server") as server:
        place = {"host": server.host, "port": server.port}
        fields = {"embeddings": tiny, "place": place, "lexical": lexical, "server": server}
        run(type("Server", (AnyOrder,), fields), examples)
