"""`open_chroma`, on real Chroma in memory and on disk."""

from __future__ import annotations

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from hashed_embeddings import HashedEmbeddings
from inside import plain, settings_of
from langchain_chroma import Chroma
from langchain_core.documents import Document

from langchain_bge_dense.chroma import index_documents, open_chroma


@pytest.fixture
def embeddings() -> HashedEmbeddings:
    return HashedEmbeddings()


def passages(count: int, first: int = 0) -> list[Document]:
    return [Document(f"passage {i}", metadata={"number": i}) for i in range(first, count)]


def test_scores_are_cosines_from_0_to_1(embeddings):
    store = open_chroma(embeddings)
    opposite = (-np.array(embeddings.embed_query("one"))).tolist()
    plain(store).upsert(
        ids=["same", "opposite"],
        embeddings=[embeddings.embed_query("one"), opposite],
        documents=["same", "opposite"],
    )
    found = store.similarity_search_with_relevance_scores("one", k=2)
    assert [document.page_content for document, _ in found] == ["same", "opposite"]
    assert [score for _, score in found] == pytest.approx([1, 0], abs=1e-5)
    assert all(0 <= score <= 1 for _, score in found)


def test_stores_in_memory_are_apart(embeddings):
    first, second = open_chroma(embeddings), open_chroma(HashedEmbeddings(16))
    index_documents(first, passages(3))
    assert len(second.get()["ids"]) == 0
    assert len(open_chroma(embeddings).get()["ids"]) == 0


def test_a_client_in_memory_is_shared(embeddings):
    client = open_chroma(embeddings)._client
    index_documents(open_chroma(embeddings, "shared", client=client), passages(3))
    assert len(open_chroma(embeddings, "shared", client=client).get()["ids"]) == 3


def test_a_folder_is_opened_again(embeddings, tmp_path):
    index_documents(open_chroma(embeddings, persist_directory=tmp_path), passages(3))
    again = open_chroma(embeddings, persist_directory=str(tmp_path))
    assert again.similarity_search("passage 1", k=1)[0].metadata == {"number": 1}


def test_a_folder_is_one_chroma_however_it_is_spelled(embeddings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_chroma(embeddings, persist_directory="db")
    second = open_chroma(embeddings, persist_directory=tmp_path / "other" / ".." / "db")
    for start in range(0, 2_000, 500):  # two Chromas on one folder lose their index here
        store = first if start % 1_000 else second
        index_documents(store, passages(start + 500, start))
    assert len(first.get(include=["embeddings"])["embeddings"]) == 2_000
    assert len(second.similarity_search("passage 7", k=2_000)) == 2_000


def test_a_relative_path_follows_the_working_directory(embeddings, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        store = open_chroma(embeddings, persist_directory="here")
        assert len(store.get()["ids"]) == 0
        index_documents(store, passages(2))
        assert (tmp_path / name / "here" / "chroma.sqlite3").exists()


def test_a_plain_client_that_runs_is_shared_however_it_is_spelled(embeddings, tmp_path):
    plain = chromadb.PersistentClient(f"{tmp_path}/other/../db")
    store = open_chroma(embeddings, "notes", persist_directory=tmp_path / "db")
    for start in range(0, 2_000, 500):  # two Chromas on one folder lose their index here
        index_documents(store, passages(start + 500, start))
        assert plain.get_collection("notes", embedding_function=None).count() == start + 500
    found = plain.get_collection("notes", embedding_function=None).get(include=["embeddings"])
    assert len(found["embeddings"]) == 2_000


def test_plain_clients_share_the_folder(embeddings, tmp_path):
    before = chromadb.PersistentClient(str(tmp_path), Settings(anonymized_telemetry=True))
    index_documents(open_chroma(embeddings, "notes", persist_directory=tmp_path), passages(3))
    assert before.get_collection("notes", embedding_function=None).count() == 3

    folder = str(tmp_path / "other")
    index_documents(open_chroma(embeddings, "notes", persist_directory=folder), passages(3))
    after = Chroma("notes", embeddings, persist_directory=folder)
    assert len(after.get()["ids"]) == 3


def test_options_reach_chroma(embeddings):
    store = open_chroma(
        embeddings,
        collection_metadata={"owner": "me"},
        collection_configuration={"hnsw": {"ef_search": 33}},
        relevance_score_fn=lambda distance: distance,
    )
    assert store._collection.metadata["owner"] == "me"
    hnsw = store._collection.configuration_json["hnsw"]
    assert (hnsw["ef_search"], hnsw["space"]) == (33, "cosine")
    assert store._select_relevance_score_fn()(0.25) == 0.25


def test_a_reset_collection_knows_its_model(embeddings):
    store = open_chroma(embeddings)
    before = settings_of(store)
    store.reset_collection()
    after = settings_of(store)
    assert before.uid != after.uid
    assert before._replace(uid=after.uid) == after
    assert store._collection.configuration_json["hnsw"]["space"] == "cosine"
    assert index_documents(store, passages(2)).added == 2


@pytest.mark.parametrize(
    "name", ["", "ab", "a b c", "../../etc", "-abc", "a..b", "ünï", "x" * 513, "abc\n", None]
)
def test_bad_names(embeddings, name):
    with pytest.raises(ValueError, match="not a name for a collection"):
        open_chroma(embeddings, name)


@pytest.mark.parametrize("name", ["abc", "A.b_c-9", "x" * 512])
def test_good_names(embeddings, name):
    assert open_chroma(embeddings, name)._collection.name == name


def test_bad_arguments(embeddings, tmp_path):
    client = open_chroma(embeddings)._client
    with pytest.raises(ValueError, match="persist_directory and client"):
        open_chroma(embeddings, persist_directory=tmp_path, client=client)
    with pytest.raises(ValueError, match="client and host"):
        open_chroma(embeddings, client=client, host="localhost")
    with pytest.raises(TypeError, match="are str, not LangChain Embeddings"):
        open_chroma("BAAI/bge-m3")
    with pytest.raises(ValueError, match="collection_configuration sets the space 'l2'"):
        open_chroma(embeddings, collection_configuration={"hnsw": {"space": "l2"}})
    with pytest.raises(ValueError, match="collection_metadata sets the space 'ip'"):
        open_chroma(embeddings, collection_metadata={"hnsw:space": "ip"})
