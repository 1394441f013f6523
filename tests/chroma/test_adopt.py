"""`adopt`: collections that other tools filled with plain Chroma become stores."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chromadb
import numpy as np
import pytest
from chroma_server import ChromaServer
from hashed_embeddings import HashedEmbeddings
from inside import coded, collections, index_of, settings_of
from langchain_chroma import Chroma
from langchain_core.documents import Document

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import adopt, index_documents, open_chroma
from langchain_bge_dense.chroma.__main__ import main
from langchain_bge_dense.chroma.settings import cosine_configuration
from langchain_bge_dense.errors import AnotherModelError, FolderBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.embeddings import Embeddings

    from langchain_bge_dense.chroma import BGEM3Chroma

EXAMPLES = Path(__file__).parents[2] / "examples" / "documents"
QUESTIONS = ("Who may sign an order?", "How many days of leave are there?", "ZB-2204", "出差")
OTHER = "人人生而自由,在尊严和权利上一律平等。"
FREE = "all human beings are born free "


def paragraphs() -> list[Document]:
    """Those of the handbook that the examples ask, with their file."""
    return [
        Document(text, id=f"{file.name} {number}", metadata={"file": file.name, "number": number})
        for file in sorted(EXAMPLES.rglob("*.md"))
        for number, text in enumerate(file.read_text("utf-8").split("\n\n"))
        if text.strip()
    ]


def texts_of(count: int) -> list[Document]:
    return [Document(f"passage {n}", id=str(n), metadata={"n": n}) for n in range(count)]


def fill(
    folder: Path,
    embeddings: Embeddings,
    documents: list[Document],
    space: str = "l2",
    name: str = "langchain",
    **options: Any,
) -> None:
    """What users of langchain-chroma do; the space is l2 unless they say so."""
    client = chromadb.PersistentClient(os.fspath(folder))
    configuration: Any = {"hnsw": {"space": space}}
    plain = Chroma(
        name, embeddings, client=client, collection_configuration=configuration, **options
    )
    plain.add_documents(documents)
    client.close()


def put(folder: Path, vectors: Any, documents: list[Any], **options: Any) -> None:
    """Vectors as they are, into a collection in l2 space; a document may be None."""
    client = chromadb.PersistentClient(os.fspath(folder))
    plain = client.create_collection("langchain", embedding_function=None)
    ids = [str(number) for number in range(len(documents))]
    plain.add(ids=ids, embeddings=np.asarray(vectors), documents=documents, **options)
    client.close()


def contents(store: BGEM3Chroma) -> dict[str, Any]:
    found = store.get(include=["documents", "metadatas"])
    rows = zip(found["documents"], found["metadatas"], strict=True)
    return dict(zip(found["ids"], rows, strict=True))


def vectors_of(store: BGEM3Chroma) -> dict[str, np.ndarray]:
    found = store.get(include=["embeddings"])
    return dict(zip(found["ids"], np.asarray(found["embeddings"]), strict=True))


def left(folder: Path, name: str = "langchain") -> tuple[int, str]:
    """Records and space of a collection, as plain Chroma opens it."""
    client = chromadb.PersistentClient(os.fspath(folder))
    found = client.get_collection(name, embedding_function=None)
    answer = found.count(), found.configuration_json["hnsw"]["space"]
    client.close()
    return answer


@pytest.fixture(scope="session")
def huggingface(small_checkpoint: Path) -> Embeddings:
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(
        model_name=str(small_checkpoint), model_kwargs={"device": "cpu"}, show_progress=False
    )


@pytest.fixture(scope="session")
def anew(small: BGEM3Embeddings) -> Iterator[BGEM3Chroma]:
    """A store that was indexed anew."""
    with open_chroma(small, "anew", lexical=True, colbert=True) as store:
        index_documents(store, paragraphs())
        yield store


@pytest.mark.parametrize("space", ["l2", "ip", "cosine"])
def test_what_huggingface_filled_answers_as_if_it_were_indexed_anew(
    huggingface, small, anew, tmp_path, space
):
    fill(tmp_path, huggingface, paragraphs(), space)
    with adopt(small, persist_directory=tmp_path, lexical=True, colbert=True) as store:
        assert contents(store) == contents(anew)
        assert settings_of(store)._replace(uid="") == settings_of(anew)._replace(uid="")
        assert store._collection.configuration_json["hnsw"]["space"] == "cosine"
        assert collections(store) == ["langchain"]
        ours = vectors_of(anew)
        for name, vector in vectors_of(store).items():
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
            assert vector @ ours[name] > 0.999_99
        for weights in ((1, 0, 0), (0.4, 0.6, 0), (0.4, 0.2, 0.4)):
            options: Any = {"k": 8, "weights": weights, "scores": True, "colbert": weights[2] > 0}
            adopted, indexed = (
                BGEM3Retriever(vectorstore=each, **options) for each in (store, anew)
            )
            for question in QUESTIONS:
                found, expected = adopted.invoke(question), indexed.invoke(question)
                assert [d.id for d in found] == [d.id for d in expected]
                for one, other in zip(found, expected, strict=True):
                    assert one.metadata == pytest.approx(other.metadata, abs=1e-3)


def test_halved_numbers_and_other_lengths_are_brought_to_unit_length(small, anew, tmp_path):
    """As a GGUF in F16 gives them; some programs leave them as long as they come."""
    documents = paragraphs()
    ours = vectors_of(anew)
    lengths = np.random.default_rng(0).uniform(0.01, 40, (len(documents), 1))
    vectors = (np.array([ours[d.id] for d in documents]) * lengths).astype(np.float16)
    put(tmp_path, vectors.astype(np.float32), [d.page_content for d in documents])
    with adopt(small, persist_directory=tmp_path, lexical=True) as store:
        for name, vector in vectors_of(store).items():
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
            assert vector @ ours[documents[int(name)].id] > 0.999_99
        retriever = BGEM3Retriever(vectorstore=store, k=1)
        expected = BGEM3Retriever(vectorstore=anew, k=1)
        for question in QUESTIONS:
            assert retriever.invoke(question)[0].page_content == (
                expected.invoke(question)[0].page_content
            )


def test_metadata_of_collection_and_passages_stay(tmp_path):
    embeddings = HashedEmbeddings()
    documents = [
        Document("one", id="1", metadata={"s": "a\0é", "i": -1, "f": 0.1, "b": True}),
        Document("two", id="2"),
        Document("", id="3", metadata={"tags": ["x", "y"]}),
    ]
    metadata = {"owner": "me", "hnsw:M": 8}
    fill(tmp_path, embeddings, documents, "ip", "notes", collection_metadata=metadata)
    options: Any = {"collection_metadata": {"team": "us"}}
    with adopt(embeddings, "notes", persist_directory=tmp_path, **options) as store:
        assert contents(store) == {d.id: (d.page_content, d.metadata or None) for d in documents}
        own = store._collection
        assert {"owner": "me", "team": "us"}.items() <= own.metadata.items()
        made = cosine_configuration(None)["hnsw"]
        assert made.items() <= own.configuration_json["hnsw"].items()
        store.add_texts(["three"])
        assert len(store.similarity_search("three", k=9)) == 4


def test_into_another_folder_the_collection_stays(tmp_path):
    embeddings = HashedEmbeddings()
    fill(tmp_path / "old", embeddings, texts_of(700))
    source = Chroma("langchain", persist_directory=str(tmp_path / "old"))
    place: Any = {"source": source, "persist_directory": tmp_path / "new"}
    with adopt(embeddings, "notes", **place) as store:
        expected = {d.id: (d.page_content, d.metadata) for d in texts_of(700)}
        assert contents(store) == expected
        assert collections(store) == ["notes"]
        store.delete(["5"])
    assert source._collection.count() == 700
    embedded = embeddings.embedded
    with adopt(embeddings, "notes", **place) as store:  # it is done
        assert len(contents(store)) == 699
    assert embeddings.embedded == embedded
    other = Chroma("other", embeddings, client=source._client)
    other.add_texts(["one"])
    with pytest.raises(ValueError, match="'notes' exists already, and is not a store of the"):
        adopt(embeddings, "notes", source=other, persist_directory=tmp_path / "new")


def test_under_another_name_in_the_same_folder(tmp_path):
    embeddings = HashedEmbeddings()
    fill(tmp_path, embeddings, texts_of(30))
    source = Chroma("langchain", persist_directory=str(tmp_path))
    with adopt(embeddings, "store", source=source, persist_directory=tmp_path) as store:
        assert len(store.similarity_search("passage", k=99)) == 30
        assert collections(store) == ["langchain", "store"]
    assert left(tmp_path) == (30, "l2")


def test_a_client_of_the_callers(tmp_path):
    embeddings = HashedEmbeddings()
    for client in (chromadb.EphemeralClient(), chromadb.PersistentClient(os.fspath(tmp_path))):
        Chroma("adopted", embeddings, client=client).add_documents(texts_of(30))
        store = adopt(embeddings, "adopted", client=client)
        assert len(store.similarity_search("passage", k=99)) == 30
        store.delete_collection()
        assert "adopted" not in [each.name for each in client.list_collections()]


def test_texts_that_are_missing(tmp_path):
    embeddings = HashedEmbeddings()
    texts = ["one", None, "three", None]
    put(tmp_path / "old", np.array(embeddings.embed_documents([t or "" for t in texts])), texts)
    message = "2 of 4 records of collection 'langchain' have no text, '1' is the first"
    with pytest.raises(ValueError, match=f"{message}, and would be lost. Delete them, or keep"):
        adopt(embeddings, persist_directory=tmp_path / "old")
    assert left(tmp_path / "old") == (4, "l2")
    source = Chroma("langchain", persist_directory=str(tmp_path / "old"))
    with pytest.warns(UserWarning, match=f"{message}. They are not copied") as caught:
        store = adopt(embeddings, source=source, persist_directory=tmp_path / "new")
    assert caught[0].filename == __file__
    with store:
        assert {name: text for name, (text, _) in contents(store).items()} == {
            "0": "one",
            "2": "three",
        }


@pytest.mark.parametrize("texts", [[None, None], ["", " \n"]])
def test_without_any_text_nothing_shows_the_model(tmp_path, texts):
    put(tmp_path, np.eye(8)[:2], texts)
    with pytest.raises(ValueError, match="has no texts, so that nothing shows which model"):
        adopt(HashedEmbeddings(), persist_directory=tmp_path)
    assert left(tmp_path) == (2, "l2")


def test_an_empty_collection(tmp_path):
    put_nothing = chromadb.PersistentClient(os.fspath(tmp_path))
    put_nothing.create_collection("langchain", embedding_function=None)
    put_nothing.close()
    with adopt(HashedEmbeddings(), persist_directory=tmp_path) as store:
        assert store.add_texts(["one"], ids=["1"]) == ["1"]


def test_another_models_vectors_are_refused(tmp_path):
    documents = [Document("x" * 3**n, id=str(n)) for n in range(9)] + texts_of(40)[20:]
    fill(tmp_path, HashedEmbeddings(), documents)
    before = left(tmp_path)
    message = (
        r"'langchain' was filled by another model than .*Embeddings other': 10 of 10 texts, "
        r"embedded again, .* -?0\.\d{3} for '0' of 1 characters, .* for '8' of 6,561 characters\."
    )
    with pytest.raises(AnotherModelError, match=message):
        adopt(HashedEmbeddings(model="other"), persist_directory=tmp_path)
    with pytest.raises(AnotherModelError, match="10 of 10 texts"):
        adopt(HashedEmbeddings(16), persist_directory=tmp_path)
    assert left(tmp_path) == before
    client = chromadb.PersistentClient(os.fspath(tmp_path))
    assert [each.name for each in client.list_collections()] == ["langchain"]
    client.close()


def test_one_text_of_ten_is_enough(tmp_path):
    embeddings = HashedEmbeddings()
    documents = [Document("x" * 3**n, id=str(n)) for n in range(9)]
    vectors = np.array(embeddings.embed_documents([d.page_content for d in documents]))
    one = vectors[4].copy()
    other = np.eye(8)[0] - one[0] * one  # at a right angle to it
    other /= np.linalg.norm(other)
    vectors[4] = 0.985 * one + np.sqrt(1 - 0.985**2) * other
    put(tmp_path / "far", vectors, [d.page_content for d in documents])
    with pytest.raises(AnotherModelError, match=r"1 of 9 texts.*is 0\.985 for '4' of 81 char"):
        adopt(embeddings, persist_directory=tmp_path / "far")
    vectors[4] = 0.991 * one + np.sqrt(1 - 0.991**2) * other
    put(tmp_path / "near", vectors, [d.page_content for d in documents])
    adopt(embeddings, persist_directory=tmp_path / "near").close()


def test_texts_that_the_other_tool_cut_are_embedded_again(tiny, tmp_path):
    short = tiny.model_copy(update={"max_length": 256, "on_truncate": "ignore"})
    texts = [*(FREE * n for n in range(1, 10)), FREE * 16 + OTHER * 13]
    documents = [Document(text, id=str(n)) for n, text in enumerate(texts)]
    fill(tmp_path, short, documents)
    message = (
        "has vectors of the first 256 tokens of longer texts, .* for '9' of .*"
        "Pass source_max_length=256"
    )
    with pytest.raises(ValueError, match=message):
        adopt(tiny, persist_directory=tmp_path)
    assert left(tmp_path) == (10, "l2")
    with adopt(tiny, persist_directory=tmp_path, source_max_length=256, lexical=True) as store:
        whole = np.array(tiny.embed_documents([d.page_content for d in documents]))
        found = vectors_of(store)
        for document, vector in zip(documents, whole, strict=True):
            assert found[document.id] @ vector > 0.999_99
        assert len(index_of(store)) == len(documents)
        assert index_documents(store, documents).added == 0


def test_a_wrong_length_of_the_other_tool(tiny, tmp_path):
    fill(tmp_path, tiny, [Document(FREE * n) for n in (1, 10, 35)])
    with pytest.raises(ValueError, match="Pass source_max_length=512"):
        adopt(tiny, persist_directory=tmp_path, source_max_length=16)
    with pytest.raises(TypeError, match="source_max_length=16 was given, and HashedEmbeddings"):
        adopt(HashedEmbeddings(), persist_directory=tmp_path, source_max_length=16)


def test_vectors_without_length_are_computed(tmp_path):
    embeddings = HashedEmbeddings()
    texts = ["one", "two", "three"]
    vectors = np.array(embeddings.embed_documents(texts))
    vectors[1] = 0
    put(tmp_path, vectors, texts)
    with adopt(embeddings, persist_directory=tmp_path) as store:
        assert embeddings.batches[-1] == ["two"]
        assert vectors_of(store)["1"] @ embeddings.embed_query("two") > 0.999


def test_reserved_keys_are_named(tmp_path):
    embeddings = HashedEmbeddings()
    documents = texts_of(3)
    documents[1].metadata["bge_m3_dense_score"] = 0.5
    fill(tmp_path, embeddings, documents)
    message = "Record '1' of .* has the metadata key 'bge_m3_dense_score', which a search writes"
    with pytest.raises(ValueError, match=message):
        adopt(embeddings, persist_directory=tmp_path)


def test_what_is_a_store_already_gets_the_signals_that_it_lacks(tiny, tmp_path):
    with open_chroma(tiny, persist_directory=tmp_path) as store:
        store.add_texts(["one", "two"], ids=["1", "2"])
        uid = store.uid
    with adopt(tiny, persist_directory=tmp_path, lexical=True, colbert=True) as store:
        assert store.uid == uid
        assert len(index_of(store)) == 2
        assert coded(store, {"1": "one", "2": "two"}) == {"1", "2"}


def test_what_cannot_be_adopted_is_told(tmp_path):
    embeddings = HashedEmbeddings()
    with pytest.raises(ValueError, match="has no location for the store"):
        adopt(embeddings)
    source = Chroma("there", embeddings, client=chromadb.EphemeralClient())
    with pytest.raises(ValueError, match="has no location for the store"):
        adopt(embeddings, source=source, collection_metadata={"owner": "me"})
    with pytest.raises(FileNotFoundError, match=r"There is no Chroma in .*typo"):
        adopt(embeddings, persist_directory=tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    fill(tmp_path, embeddings, texts_of(3))
    with pytest.raises(ValueError, match=r"no collection 'notes' among \['langchain'\]"):
        adopt(embeddings, "notes", persist_directory=tmp_path)
    with pytest.raises(TypeError, match=r"source is str\. Pass the Chroma that has"):
        adopt(embeddings, source="langchain", persist_directory=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lexical=True needs BGEM3Embeddings, and HashedEmbeddings"):
        adopt(embeddings, persist_directory=tmp_path, lexical=True)
    assert left(tmp_path) == (3, "l2")


def test_ten_thousand_passages_in_constant_memory(tmp_path):
    embeddings, count = HashedEmbeddings(), 10_000
    documents = [Document(f"{n} ".ljust(2_000, "."), id=str(n)) for n in range(count)]
    for start in range(0, count, 5_000):
        fill(tmp_path, embeddings, documents[start : start + 5_000])
    embedded = embeddings.embedded
    tracemalloc.start()
    try:
        with adopt(embeddings, persist_directory=tmp_path) as store:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert store._collection.count() == count
            assert [d.id for d in store.similarity_search(documents[77].page_content, k=1)] == [
                "77"
            ]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # the texts have twenty
    assert len(list(tmp_path.glob("*/header.bin"))) == 1  # that of the collection is gone
    assert embeddings.embedded == embedded + 10


KILLED = """
import sys
from killing import kill_at
from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import adopt

kill_at(*sys.argv[3:])
embeddings = BGEM3Embeddings(model=sys.argv[2], device="cpu", dtype="float32")
adopt(embeddings, persist_directory=sys.argv[1], lexical=True)
"""


class Counting(BGEM3Embeddings):
    """Keeps the texts whose lexical weights were computed."""

    def encode(self, texts, **outputs):
        COUNTED.extend(texts)
        return super().encode(texts, **outputs)


COUNTED: list[str] = []


@pytest.mark.parametrize(
    ("moment", "missing"),
    [
        (("Collection", "upsert", "1"), 700),
        (("Collection", "upsert", "3"), 700 - 512),
        (("Collection", "modify", "1"), 0),
        (("Client", "delete_collection", "1"), 0),
        (("Collection", "modify", "2"), 0),
    ],
)
def test_killed_at_any_step(tiny, tiny_checkpoint, tmp_path, moment, missing):
    fill(tmp_path, tiny, texts_of(700))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, tmp_path, tiny_checkpoint, *moment]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    if moment != ("Collection", "modify", "2"):
        assert left(tmp_path) == (700, "l2")
        with pytest.raises(ValueError, match="has the space 'l2'"):
            open_chroma(tiny, persist_directory=tmp_path)
    COUNTED.clear()
    counting = Counting(**tiny.model_dump())
    with adopt(counting, persist_directory=tmp_path, lexical=True) as store:
        assert len(COUNTED) == missing
        expected = {d.id: (d.page_content, d.metadata) for d in texts_of(700)}
        assert contents(store) == expected
        assert len(index_of(store)) == 700
        assert len(store.similarity_search("passage", k=999)) == 700
        assert collections(store) == ["langchain"]


def interrupted(embeddings: HashedEmbeddings, monkeypatch, **place: Any) -> None:
    """Adopt a collection, and stop before it is put in place."""
    module = sys.modules["langchain_bge_dense.chroma.adopt"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_by_copy", lambda *_: exit_())
        with pytest.raises(KeyboardInterrupt):
            adopt(embeddings, **place)


def exit_() -> None:
    raise KeyboardInterrupt


def test_what_was_deleted_since_a_run_is_deleted_from_the_copy(tmp_path, monkeypatch):
    embeddings = HashedEmbeddings()
    fill(tmp_path, embeddings, texts_of(30))
    interrupted(embeddings, monkeypatch, persist_directory=tmp_path)
    client = chromadb.PersistentClient(os.fspath(tmp_path))
    client.get_collection("langchain", embedding_function=None).delete(ids=["3"])
    client.close()
    with adopt(embeddings, persist_directory=tmp_path) as store:
        assert sorted(contents(store)) == sorted(d.id for d in texts_of(30) if d.id != "3")


def test_the_copy_of_another_collection_becomes_this_one(tmp_path, monkeypatch):
    embeddings = HashedEmbeddings()
    client = chromadb.EphemeralClient()
    place: Any = {"persist_directory": tmp_path}
    Chroma("one", embeddings, client=client).add_texts(["one"], ids=["1"])
    Chroma("two", embeddings, client=client).add_texts(["two"], ids=["2"])
    one, two = Chroma("one", client=client), Chroma("two", client=client)
    interrupted(embeddings, monkeypatch, source=one, **place)
    for _ in range(2):
        with adopt(embeddings, source=two, **place) as store:
            assert contents(store) == {"2": ("two", None)}


def test_a_collection_that_is_written_to_meanwhile_is_not_replaced(tmp_path):
    texts = ["one", "two", "three"]
    vectors = np.array(HashedEmbeddings().embed_documents(texts))
    vectors[2] = 0
    put(tmp_path, vectors, texts)
    client = chromadb.PersistentClient(os.fspath(tmp_path))
    plain = client.get_collection("langchain", embedding_function=None)
    embeddings = HashedEmbeddings()

    def embed_and_delete(texts: list[str]) -> list[list[float]]:
        if texts == ["three"]:  # which has no length, and is computed on the way
            plain.delete(ids=["0"])
        return HashedEmbeddings().embed_documents(texts)

    embeddings.embed_documents = embed_and_delete
    with pytest.raises(RuntimeError, match="has 2 records, and 3 were read: somebody writes"):
        adopt(embeddings, client=client)
    with adopt(HashedEmbeddings(), client=client) as store:
        assert sorted(contents(store)) == ["1", "2"]


def test_a_folder_that_another_store_writes_to_in_another_process(tmp_path):
    from filelock import FileLock

    fill(tmp_path, HashedEmbeddings(), texts_of(3))
    with FileLock(tmp_path / "indexing.lock"), pytest.raises(FolderBusyError):
        adopt(HashedEmbeddings(), persist_directory=tmp_path)


def test_on_a_server_and_from_there_into_a_folder(tiny, tiny_checkpoint, tmp_path):
    with ChromaServer(tmp_path / "server") as server:
        place: Any = {"host": server.host, "port": server.port}
        plain = Chroma("notes", tiny, **place)
        plain.add_documents(texts_of(700))
        expected = {d.id: (d.page_content, d.metadata) for d in texts_of(700)}
        with adopt(tiny, source=plain, persist_directory=tmp_path / "db", lexical=True) as store:
            assert contents(store) == expected
            assert len(index_of(store)) == 700
        url, folder = f"http://{server.host}:{server.port}", str(tmp_path / "cli")
        options = ["--collection", "notes", "--to", folder, "--model", str(tiny_checkpoint)]
        main(["adopt", url, *options])
        assert left(tmp_path / "cli", "notes") == (700, "cosine")
        with pytest.raises(ValueError, match=f"adopt {url} --coll"):
            open_chroma(tiny, "notes", **place)
        with adopt(tiny, "notes", lexical=True, **place) as store:
            assert contents(store) == expected
            assert len(index_of(store)) == 700
            assert collections(store) == sorted(["notes", f"{store.uid}.signals"])


class TestCommandLine:
    def test_the_one_that_the_error_of_open_chroma_names(self, tiny, tmp_path):
        fill(tmp_path, tiny, texts_of(5), name="notes")
        with pytest.raises(ValueError, match="pass the same arguments to adopt") as raised:
            open_chroma(tiny, "notes", persist_directory=tmp_path)
        line = str(raised.value).partition("or type: ")[2].partition(". Or")[0]
        python, *rest = shlex.split(line)
        assert python == "python"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, *rest, "--lexical", "--colbert", "2bit"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == (
            "5 passages with lexical weights and '2bit' ColBERT codes with colbert_pooling=1.\n"
        )
        assert "5/5" in done.stderr
        with open_chroma(tiny, "notes", persist_directory=tmp_path) as store:
            assert (store.lexical, store.colbert) == (True, "2bit")
            assert len(index_of(store)) == 5

    def test_into_another_place_under_another_name(self, tiny, tiny_checkpoint, tmp_path, capsys):
        fill(tmp_path / "old", tiny, texts_of(5))
        old, new = (str(tmp_path / name) for name in ("old", "new"))
        options = ["--device", "cpu", "--dtype", "float32", "--model", str(tiny_checkpoint)]
        main(["adopt", old, "--to", new, "--name", "notes", *options])
        assert capsys.readouterr().out == "5 passages with dense vectors alone.\n"
        assert left(tmp_path / "old") == (5, "l2")
        assert left(tmp_path / "new", "notes") == (5, "cosine")

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["typo"], "There is no Chroma in 'typo'"),
            (["typo", "--to", "db"], "There is no Chroma in 'typo'"),
            (["db", "--collection", "notes"], r"no collection 'notes' among \['langchain'\]"),
            (["db", "--collection", "notes", "--to", "other"], "notes"),
            (["db", "--dtype", "int8", "--base-url", "x"], "base_url is 'x'"),
        ],
    )
    def test_errors_are_told_in_a_line(self, tiny_checkpoint, tmp_path, monkeypatch, options, told):
        monkeypatch.chdir(tmp_path)
        fill(Path("db"), HashedEmbeddings(), texts_of(5))
        with pytest.raises(SystemExit, match=told):
            main(["adopt", *options, "--model", str(tiny_checkpoint)])
        assert [path.name for path in tmp_path.iterdir()] == ["db"]
