"""Bad arguments of a store: an error that says what and where, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hashed_embeddings import HashedEmbeddings
from langchain_core.documents import Document

from langchain_bge_dense.chroma import BGEM3Chroma, index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def store() -> BGEM3Chroma:
    return open_chroma(HashedEmbeddings())


BAD: list[tuple[type[Exception], str, Callable[[BGEM3Chroma], Any]]] = [
    (TypeError, "id of document 0 is 0, not a str", lambda s: s.add_texts(["a"], ids=[0])),
    (TypeError, "id of document 1 is 7", lambda s: s.add_texts(["a", "b"], ids=[None, 7])),
    (ValueError, "id of document 0 is empty", lambda s: s.add_texts(["a"], ids=[""])),
    (ValueError, "id of document 0, .*surrogate", lambda s: s.add_texts(["a"], ids=["\ud800"])),
    (
        ValueError,
        "id of document 0, .*surrogate",
        lambda s: index_documents(s, [Document("a", id="\ud800")]),
    ),
    (ValueError, "2 metadatas for 1 texts", lambda s: s.add_texts(["a"], [{"k": 1}, {"k": 2}])),
    (ValueError, "1 ids for 2 texts", lambda s: s.add_texts(["a", "b"], ids=["x"])),
    (ValueError, "3 ids for 2 texts", lambda s: s.add_texts(["a", "b"], ids=["x", "y", "z"])),
    (TypeError, "Text 1 is NoneType, not str", lambda s: s.add_texts(["a", None])),
    (TypeError, "metadatas and ids are lists", lambda s: s.add_texts(["a"], {"k": 1})),
    (TypeError, "metadatas and ids are lists", lambda s: s.add_texts(["a"], ids="x")),
    (TypeError, r"A single str was passed", lambda s: s.add_texts("a text")),
    (TypeError, r"A single int was passed", lambda s: s.add_texts(7)),
    (
        ValueError,
        "1 documents for 2 ids",
        lambda s: s.update_documents(["x", "y"], [Document("a")]),
    ),
    (TypeError, "id of document 0 is 3", lambda s: s.update_documents([3], [Document("a")])),
    (NotImplementedError, "holds texts", lambda s: s.add_images(["a.png"])),
    (NotImplementedError, "share signals", lambda s: s.fork("copy")),
    (
        ValueError,
        "metadata key 'chroma:page'",
        lambda s: s.add_texts(["a"], [{"chroma:page": 1}]),
    ),
    (
        TypeError,
        "A single str was passed",
        lambda s: BGEM3Chroma.from_texts("a text", HashedEmbeddings()),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD)
def test_are_refused(store, error, message, call):
    with pytest.raises(error, match=message):
        call(store)
    assert store.get()["ids"] == []


def test_generators_are_read_once():
    documents = (Document(str(n), metadata={"n": n}, id=str(n)) for n in range(3))
    store = BGEM3Chroma.from_documents(documents, HashedEmbeddings())
    assert [m["n"] for m in store.get()["metadatas"]] == [0, 1, 2]
    assert store.get()["ids"] == ["0", "1", "2"]
    store = BGEM3Chroma.from_texts((str(n) for n in range(3)), HashedEmbeddings())
    assert store.get()["documents"] == ["0", "1", "2"]


def test_missing_metadata_and_ids_are_filled_in(store):
    ids = store.add_texts(["a", "b"], [{"k": 1}, None], ids=["x", None])
    assert ids[0] == "x"
    assert store.get(ids=ids)["metadatas"] == [{"k": 1}, None]
    store.add_texts(["c", "d"], [{"k": 3}])
    assert len(store.get()["ids"]) == 4
