"""Which embeddings a collection takes, and which collections embeddings take over."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from hashed_embeddings import HashedEmbeddings
from inside import settings_of
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import index_documents, open_chroma
from langchain_bge_dense.chroma.folder import start
from langchain_bge_dense.chroma.settings import (
    CollectionSettings,
    claim,
    cosine_configuration,
    fingerprint_of,
    same_model,
    underlying,
)

COSINE = {"hnsw": {"space": "cosine"}}
MADE = {"hnsw": {"space": "cosine", "max_neighbors": 48, "ef_construction": 400, "ef_search": 400}}


@pytest.fixture
def client(tmp_path):
    return chromadb.PersistentClient(str(tmp_path))


@pytest.fixture
def embeddings() -> HashedEmbeddings:
    return HashedEmbeddings()


def reopen(embeddings, client):
    return open_chroma(embeddings, "notes", client=client)


def plain(embeddings, client, configuration=COSINE, **options) -> Chroma:
    return Chroma(
        "notes", embeddings, client=client, collection_configuration=configuration, **options
    )


class TestIdentity:
    def test_of_embeddings_that_have_one(self, tiny):
        assert CollectionSettings.of(tiny)[:2] == (tiny.fingerprint, tiny.dimension)

    def test_of_embeddings_with_a_model(self):
        assert fingerprint_of(HashedEmbeddings(model="m")) == "hashed_embeddings.HashedEmbeddings m"

    @pytest.mark.parametrize(
        ("attributes", "expected"),
        [
            ({"model_name": "b"}, "types.SimpleNamespace b"),
            ({"model": object(), "model_name": "b"}, "types.SimpleNamespace b"),
            ({"fingerprint": "own", "model": "a"}, "own"),
            ({"fingerprint": None, "model": "a"}, "types.SimpleNamespace a"),
        ],
    )
    def test_of_other_attributes(self, attributes, expected):
        assert fingerprint_of(SimpleNamespace(**attributes)) == expected

    def test_of_embeddings_without_anything(self):
        name = "langchain_core.embeddings.fake.DeterministicFakeEmbedding"
        assert CollectionSettings.of(DeterministicFakeEmbedding(size=7))[:2] == (name, 7)

    def test_behind_wrappers(self):
        class Unasked(HashedEmbeddings):
            def embed_query(self, text):
                raise AssertionError(text)

        model = Unasked(5)
        wrapped = SimpleNamespace(
            underlying_embeddings=SimpleNamespace(underlying_embeddings=model)
        )
        assert underlying(wrapped) is model
        assert CollectionSettings.of(wrapped)[:2] == (fingerprint_of(model), 5)

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("0123456789ab-cls", "a-0123456789ab-cls", True),
            ("a-0123456789ab-cls", "b-0123456789ab-cls", True),
            ("a-0123456789ab-cls", "my-own-a-0123456789ab-cls", True),
            ("a-0123456789ab-cls", "a-0123456789ab-mean", False),
            ("a-0123456789ab-cls", "a-ba9876543210-cls", False),
            ("a-0123456789ab-cls", "a-0123456789ab-cls-query_01234567", False),
            ("module.One a-b", "module.Two a-b", False),
            ("same", "same", True),
        ],
    )
    def test_same_model(self, one, other, same):
        assert same_model(one, other) is same


class TestKnownCollections:
    def test_the_same_model(self, embeddings, client):
        before = reopen(embeddings, client)._collection.metadata
        after = reopen(HashedEmbeddings(), client)._collection.metadata
        assert before == after
        assert settings_of(reopen(embeddings, client)).dimension == 8

    def test_another_model(self, embeddings, client):
        index_documents(reopen(embeddings, client), [Document("one")])
        with pytest.raises(
            ValueError, match=r"'notes' holds vectors of .*Embeddings hash', not of "
        ):
            reopen(HashedEmbeddings(model="other"), client)
        assert reopen(embeddings, client).get()["documents"] == ["one"]

    def test_another_dimension(self, embeddings, client):
        reopen(embeddings, client)
        with pytest.raises(ValueError, match=r"vectors of 8 numbers.* have 16.* collection_name"):
            reopen(HashedEmbeddings(16), client)

    def test_metadata_of_the_first_opening_stays(self, embeddings, client):
        for owner in ("first", "second"):
            store = open_chroma(
                embeddings, "notes", client=client, collection_metadata={"owner": owner}
            )
            assert store._collection.metadata["owner"] == "first"

    def test_a_copied_checkpoint_is_the_same_model(self, tiny, tiny_checkpoint, tmp_path, client):
        copy = shutil.copytree(tiny_checkpoint, tmp_path / "renamed")
        index_documents(reopen(tiny, client), [Document("one")])
        same = BGEM3Embeddings(model=copy, device="cpu")
        assert reopen(same, client).get()["documents"] == ["one"]
        other = BGEM3Embeddings(model=copy, device="cpu", document_instruction="passage: ")
        with pytest.raises(ValueError, match="-cls-document_"):
            reopen(other, client)

    def test_one_of_a_later_version_with_more_settings(self, embeddings, client):
        own = CollectionSettings.of(embeddings)
        stored = {"langchain_bge_dense": json.dumps({**own._asdict(), "later": 1})}
        plain(embeddings, client, collection_metadata=stored)
        assert settings_of(reopen(embeddings, client)) == own


class TestSpaces:
    @pytest.mark.parametrize(
        ("given", "made"),
        [
            (None, MADE),
            ({"hnsw": None}, MADE),
            ({"hnsw": {"max_neighbors": 8}}, {"hnsw": {**MADE["hnsw"], "max_neighbors": 8}}),
            ({"other": 1}, {"other": 1, **MADE}),
            ({"spann": {"reassign": 2}}, {"spann": {"reassign": 2, "space": "cosine"}}),
        ],
    )
    def test_cosine_is_filled_in(self, given, made):
        assert cosine_configuration(given) == made

    @pytest.mark.parametrize("index", ["hnsw", "spann"])
    def test_another_is_refused(self, index):
        message = (
            "^The collection_configuration sets the space 'l2', .*'cosine'. Leave .* 'cosine'.$"
        )
        with pytest.raises(ValueError, match=message):
            cosine_configuration({index: {"space": "l2"}})

    @pytest.mark.parametrize(
        ("configuration", "space"),
        [
            ({"spann": {"space": "ip"}}, "ip"),
            ({"hnsw": None, "spann": None}, "l2"),
            ({"hnsw": {"ef_search": 9}}, "l2"),
        ],
    )
    def test_of_a_collection(self, embeddings, configuration, space):
        session = SimpleNamespace(location="db")
        collection = SimpleNamespace(
            name="n", configuration_json=configuration, metadata=None, session=session
        )
        with pytest.raises(ValueError, match=f"Collection 'n' has the space '{space}'"):
            claim(collection, embeddings, CollectionSettings.of(embeddings), "")


class TestLocalClient:
    def test_nobody_else_has_the_database(self):
        one, other = start(None, {}), start(None, {})
        one.create_collection("notes", embedding_function=None)
        assert not other.list_collections()

    def test_a_database_that_is_named(self):
        name = start(None, {}).database
        assert start(None, {"database": name}).database == name

    def test_a_client_that_was_here_first_is_left_as_it_is(self, tmp_path):
        first = chromadb.PersistentClient(str(tmp_path), Settings(anonymized_telemetry=True))
        first.create_collection("notes", embedding_function=None)
        client = start(str(tmp_path), {"tenant": "default_tenant", "database": "default_database"})
        assert [found.name for found in client.list_collections()] == ["notes"]
        assert client.get_settings().anonymized_telemetry


class TestPlainCollections:
    def test_empty_in_cosine_space(self, embeddings, client):
        plain(embeddings, client, collection_metadata={"owner": "me"})
        metadata = reopen(embeddings, client)._collection.metadata
        assert metadata["owner"] == "me"
        assert CollectionSettings.load(metadata).fingerprint == fingerprint_of(embeddings)
        with pytest.raises(ValueError, match="holds vectors of"):
            reopen(HashedEmbeddings(model="other"), client)

    def test_cosine_space_named_in_the_metadata(self, embeddings, client):
        plain(embeddings, client, None, collection_metadata={"hnsw:space": "cosine"})
        store = reopen(embeddings, client)
        assert store._collection.configuration_json["hnsw"]["space"] == "cosine"
        assert index_documents(store, [Document("one")]).added == 1

    @pytest.mark.parametrize("space", ["l2", "ip"])
    def test_another_space(self, embeddings, client, space):
        before = plain(embeddings, client, {"hnsw": {"space": space}})._collection.metadata
        with pytest.raises(
            ValueError, match=f"'notes' has the space '{space}'.* to adopt of .*take another"
        ):
            reopen(embeddings, client)
        assert client.get_collection("notes", embedding_function=None).metadata == before

    def test_filled_by_the_same_model(self, embeddings, client):
        plain(embeddings, client).add_texts(["a long text that costs more", "short"])
        store = reopen(embeddings, client)
        assert embeddings.batches[-1] == ["short"]
        assert CollectionSettings.load(store._collection.metadata)
        assert len(store.get()["ids"]) == 2

    def test_few_of_many_are_read(self, embeddings, client):
        texts = [*("a text of some length" for _ in range(9)), "medium", "short"]
        plain(embeddings, client).add_texts(texts)
        reopen(embeddings, client)
        assert embeddings.batches[-1] == ["medium"]

    def test_filled_by_the_same_model_in_another_dtype(self, embeddings, client):
        one, *_ = np.eye(8)
        near, far = (7 * np.array([c, np.sqrt(1 - c * c), *np.zeros(6)]) for c in (0.991, 0.989))
        embeddings.embed_documents = lambda _: [one.tolist()]
        collection = plain(embeddings, client)._collection
        collection.upsert(ids=["a"], embeddings=[far.tolist()], documents=["one"])
        with pytest.raises(ValueError, match=r"has cosine 0\.989 to"):
            reopen(embeddings, client)
        collection.upsert(ids=["a"], embeddings=[near.tolist()], documents=["one"])
        assert settings_of(reopen(embeddings, client)).fingerprint == fingerprint_of(embeddings)

    def test_filled_by_another_model(self, embeddings, client):
        plain(HashedEmbeddings(model="other"), client).add_texts(["one"])
        message = (
            rf"filled by another model than '{fingerprint_of(embeddings)}': .* has cosine -?0\."
        )
        with pytest.raises(ValueError, match=message):
            reopen(embeddings, client)
        assert client.get_collection("notes", embedding_function=None).metadata is None

    def test_filled_with_another_dimension(self, embeddings, client):
        plain(HashedEmbeddings(16), client).add_texts(["one"])
        with pytest.raises(ValueError, match="holds vectors of 16 numbers"):
            reopen(embeddings, client)

    def test_filled_without_texts(self, embeddings, client):
        vectors = np.eye(8, dtype=np.float32)[:2]
        plain(embeddings, client)._collection.upsert(ids=["a", "b"], embeddings=vectors)
        with pytest.raises(ValueError, match="has vectors and no texts"):
            reopen(embeddings, client)
