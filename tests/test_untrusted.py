"""Names, texts and metadata of users whom nobody trusts: data, whatever is written in them."""

from __future__ import annotations

import pytest
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document

from langchain_bge_dense.chroma import index_documents, open_chroma

OPERATORS = [
    '{"$ne": ""}',
    "$ne",
    "$or",
    "' OR 1=1 --",
    "'); DROP TABLE embeddings; --",
    "%",
    "*",
    "chroma:document",
    "#document",
    "\0",
]


@pytest.fixture
def store():
    """One document of each user, who is named as badly as can be, and writes as badly."""
    store = open_chroma(HashedEmbeddings())
    documents = [Document(f"text of {name}", metadata={"user": name}) for name in OPERATORS]
    documents += [Document(name, metadata={"user": "nobody", "list": [name]}) for name in OPERATORS]
    assert index_documents(store, documents).added == 2 * len(OPERATORS)
    return store


@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_compared_and_nothing_else(store, name):
    found = store.similarity_search("anything", k=100, filter={"user": name})
    assert [document.page_content for document in found] == [f"text of {name}"]
    assert store.get(where={"user": {"$eq": name}})["documents"] == [f"text of {name}"]


@pytest.mark.parametrize("name", OPERATORS)
def test_queries_are_texts(store, name):
    found = store.similarity_search(name, k=1)
    assert found == [Document(name, metadata=found[0].metadata, id=found[0].id)]
    assert found[0].metadata == {"user": "nobody", "list": [name]}
    assert len(store.similarity_search(name, k=100)) == 2 * len(OPERATORS)


@pytest.mark.parametrize("key", ["$ne", "$and", "#document", "chroma:document"])
def test_keys_that_filters_know_are_refused(store, key):
    with pytest.raises(ValueError, match="which Chroma keeps for itself"):
        index_documents(store, [Document("one", metadata={key: "value"})])
    assert len(store.get()["ids"]) == 2 * len(OPERATORS)


@pytest.mark.parametrize("value", [{"$ne": ""}, [{"$ne": ""}], [["$or"]]])
def test_operators_for_values_are_refused(store, value):
    with pytest.raises(TypeError, match="that Chroma cannot store"):
        index_documents(store, [Document("one", metadata={"user": value})])


@pytest.mark.parametrize("name", [*OPERATORS, {"$ne": "mine"}])
def test_names_of_collections_are_names(name):
    with pytest.raises(ValueError, match="not a name for a collection"):
        open_chroma(HashedEmbeddings(), name)
