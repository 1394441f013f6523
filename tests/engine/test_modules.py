"""Prompts of a checkpoint; test_checkpoints.py holds them against sentence-transformers."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.documents import Document
from model_server import served

from langchain_bge_dense import BGEM3Embeddings, BGEM3Reranker
from langchain_bge_dense.matches import find_matches

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = "config_sentence_transformers.json"
TEXT = "free and equal"
NAMED = {"query": "find: ", "document": "text: ", "other": "never: "}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def load(folder: Path, **settings: Any) -> BGEM3Embeddings:
    return BGEM3Embeddings(**{"model": folder, "device": "cpu", "dtype": "float32"} | settings)


def write_prompts(folder: Path, prompts: Any, default: Any = None) -> None:
    content = {"prompts": prompts, "default_prompt_name": default}
    (folder / PROMPTS).write_text(json.dumps(content))


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompts", "default", "query", "document"),
        [
            ({}, None, "", ""),
            (None, None, "", ""),
            ({"query": "q: "}, None, "q: ", ""),
            ({"query": "q: "}, "query", "q: ", ""),
            ({"query": "q: ", "passage": "p: "}, None, "q: ", "p: "),
            ({"document": "d: ", "passage": "p: "}, None, "", "d: "),
            ({"query": "", "document": "", "corpus": "c: "}, None, "", "c: "),
            ({"other": "o: "}, None, "", ""),
            ({"other": "o: "}, "other", "o: ", "o: "),
            ({"query": "", "document": None, "other": "o: "}, "other", "o: ", "o: "),
        ],
    )
    def test_by_name(
        self, folder: Path, prompts: Any, default: Any, query: str, document: str
    ) -> None:
        write_prompts(folder, prompts, default)
        found, plain = load(folder), load(folder, query_instruction="", document_instruction="")
        told = load(folder, query_instruction=query, document_instruction=document)
        assert found.fingerprint == told.fingerprint
        assert (found.fingerprint == plain.fingerprint) == (query == document == "")
        assert found.embed_query(TEXT) == plain.embed_query(query + TEXT)
        assert found.embed_documents([TEXT]) == plain.embed_documents([document + TEXT])

    def test_go_through_everything_that_embeds(self, folder: Path) -> None:
        write_prompts(folder, NAMED)
        found = load(folder)
        told = load(folder, query_instruction="find: ", document_instruction="text: ")
        documents = [Document(text) for text in ("equal rights", "a dense vector", TEXT)]
        with served(found) as url:
            remote = BGEM3Embeddings(base_url=url)
            plain = BGEM3Embeddings(base_url=url, query_instruction="")
            assert remote.fingerprint == found.fingerprint == told.fingerprint
            assert plain.fingerprint == load(folder, query_instruction="").fingerprint
            for embeddings in (found, remote):
                assert embeddings.embed_query(TEXT) == told.embed_query(TEXT)
                assert embeddings.embed_documents([TEXT]) == told.embed_documents([TEXT])
                assert find_matches(embeddings, TEXT, documents) == find_matches(
                    told, TEXT, documents
                )
                found_order, told_order = (
                    BGEM3Reranker(embeddings=e).compress_documents(documents, TEXT)
                    for e in (embeddings, told)
                )
                assert found_order == told_order

    def test_of_a_server_are_its_own_instructions(self, folder: Path) -> None:
        write_prompts(folder, NAMED)
        own = load(folder, query_instruction="ask: ")
        with served(own) as url:
            remote = BGEM3Embeddings(base_url=url)
            assert remote.fingerprint == own.fingerprint
            assert remote.embed_query(TEXT) == own.embed_query(TEXT)

    @pytest.mark.parametrize("prompts", [["find: "], "find: ", {"query": 7}])
    def test_of_no_known_form_are_refused(self, folder: Path, prompts: Any) -> None:
        write_prompts(folder, prompts)
        with pytest.raises(ValueError, match=rf"{PROMPTS} is damaged: its prompts are"):
            load(folder).load()
