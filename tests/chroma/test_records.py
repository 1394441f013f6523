"""What of a document Chroma can keep, and its id."""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path

import numpy as np
import pytest
from hashed_embeddings import HashedEmbeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document

from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.records import record

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(
    texts,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False, width=16),  # Chroma rounds last digits
)
lists = st.one_of(
    st.lists(kind, min_size=1, max_size=3)
    for kind in (texts, st.booleans(), st.integers(-(2**63), 2**63 - 1))
)
keys = texts.filter(lambda key: key and key[0] not in "#$" and key != "chroma:document")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, st.dictionaries(keys, scalars | lists, max_size=3)), max_size=3))
def test_whatever_passes_is_kept_as_it_was(contents):
    store = open_chroma(HashedEmbeddings(2))
    documents = [Document(text, metadata=metadata) for text, metadata in contents]
    index_documents(store, documents)
    found = store.get()
    metadatas = (metadata or {} for metadata in found["metadatas"])
    kept = zip(found["ids"], zip(found["documents"], metadatas, strict=True), strict=True)
    stored = dict(kept)
    records = [record(document, 0) for document in documents]
    # Chroma may change the last digit of a float; everything else is kept to the last bit.
    assert all(r.equals(*stored[r.id]) for r in records)
    assert stored.keys() == {r.id for r in records}
    assert index_documents(store, documents).added == 0


@pytest.mark.parametrize(
    "value",
    [
        {"$ne": ""},
        {},
        (1, 2),
        [],
        [1, "a"],
        [1, 2.0],
        [True, 1],
        [None],
        [["a"]],
        [np.float64(1)],
        b"bytes",
        np.int64(1),
        Path("a"),
        dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
        ...,
    ],
    ids=repr,
)
def test_types_that_chroma_cannot_store(value):
    with pytest.raises(TypeError, match=r" that Chroma cannot store\. Use str, .*four\.$") as e:
        record(Document("text", metadata={"good": 1, "key": value}), 3)
    named = f"Document 3 has the metadata 'key' = {value!r}, a {type(value).__name__} that"
    assert str(e.value).startswith(named)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, [1.0, math.nan], 2**63, -(2**63) - 1, [2**63]], ids=repr
)
def test_numbers_that_chroma_cannot_store(value):
    message = r"^Document 3 has the metadata 'key' = .* cannot store\. Use finite floats .*str\.$"
    with pytest.raises(ValueError, match=message):
        record(Document("text", metadata={"key": value}), 3)


@pytest.mark.parametrize("key", ["", "$or", "$contains", "#id", "chroma:document"])
def test_keys_that_chroma_keeps_for_itself(key):
    with pytest.raises(ValueError, match=r"Document 3 has the metadata key .*Rename it"):
        record(Document("text", metadata={key: "value"}), 3)


def test_keys_that_are_not_text():
    message = r"^Document 3 has the metadata key 1, which is int\. Make it a str\.$"
    with pytest.raises(TypeError, match=message):
        record(Document("text", metadata={1: "value"}), 3)


@pytest.mark.parametrize(
    "document",
    [
        Document("a\ud800b"),
        Document("text", metadata={"key": "\udfff"}),
        Document("text", metadata={"\udfff": "value"}),
        Document("text", metadata={"key": ["\udfff"]}),
    ],
)
def test_lone_surrogates(document):
    message = (
        r"^Document 3 has a lone surrogate, '.ud...', in its text or metadata\. Decode .*clean"
    )
    with pytest.raises(ValueError, match=message):
        record(document, 3)


@pytest.mark.parametrize(
    "item", ["text", None, {"page_content": "text"}, Document.model_construct(page_content=None)]
)
def test_items_that_are_no_documents(item):
    message = f"^Item 3 is {type(item).__name__}, not a Document with text. Wrap texts as Document"
    with pytest.raises(TypeError, match=message):
        record(item, 3)


def test_ids_tell_contents_apart():
    contents = [
        ("a", {}),
        ("a", {"k": 1}),
        ("a", {"k": 1.0}),
        ("a", {"k": True}),
        ("a", {"k": "1"}),
        ("a", {"k": [1]}),
        ("a", {"l": 1}),
        ('a", {"k": 1', {}),
        ("", {}),
    ]
    ids = {record(Document(text, metadata=metadata), 0).id for text, metadata in contents}
    assert len(ids) == len(contents)


def test_ids_are_of_content_alone():
    one = record(Document("a", metadata={"k": 1, "l": "é", "bge_m3_dense_score": 0.5}), 0).id
    assert one == record(Document("a", metadata={"l": "é", "k": 1, "none": None}), 9).id
    assert one.startswith("5ee8763fe426")  # another would embed everybody's documents again


def test_the_callers_id_and_the_place_are_kept():
    kept = record(Document("a", id="mine"), 7)
    assert (kept.id, kept.position) == ("mine", 7)


def test_zeros_are_equal_and_any_letter_may_begin_a_key():
    one, other = (record(Document("a", metadata={"X": zero}), 0) for zero in (0.0, -0.0))
    assert one.id == other.id
    assert math.copysign(1, other.metadata["X"]) == 1


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (0.1, 0.10000000000000002, True),
        (0.1, 0.1001, False),
        (1.0, 1.0000000001, False),
        (["a"], "a", False),
        ("a", ["a"], False),
        (1, 1.0, False),
        (1, True, False),
        ([1.5, 2.5], [1.5, 2.5000000000000004], True),
        (["a"], ["a", "b"], False),
        ("a", "a", True),
    ],
)
def test_what_counts_as_equal(one, other, equal):
    assert record(Document("x", metadata={"k": one}), 0).equals("x", {"k": other}) is equal
    assert not record(Document("x", metadata={"k": one}), 0).equals("y", {"k": one})
    assert not record(Document("x", metadata={"k": one}), 0).equals("x", {"k": one, "l": 1})
