"""Fields, checks and conversions of `BGEM3Embeddings`."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError
from reference import flag_model

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.flag import flag_model_class
from langchain_bge_dense.sparse import BGEM3QdrantSparse

if TYPE_CHECKING:
    from pathlib import Path


def changed(embeddings: BGEM3Embeddings, **fields: Any) -> BGEM3Embeddings:
    return BGEM3Embeddings(**{**embeddings.model_dump(), **fields})


def test_vectors_are_python_floats_of_unit_length(tiny: BGEM3Embeddings) -> None:
    [document] = tiny.embed_documents(["free and equal"])
    query = tiny.embed_query("free and equal")
    assert {type(value) for value in (*document, *query)} == {float}
    assert len(document) == len(query) == tiny.dimension == 32
    assert sum(value * value for value in document) == pytest.approx(1, abs=1e-6)
    assert document == query


def test_no_texts_give_no_vectors_without_loading(tiny_checkpoint: Path) -> None:
    embeddings = BGEM3Embeddings(model=tiny_checkpoint)
    assert embeddings.embed_documents([]) == []
    assert embeddings._engine is None


def test_encode_of_nothing_keeps_the_shapes(tiny: BGEM3Embeddings) -> None:
    encoding = tiny.encode([], lexical=True, colbert=True)
    assert encoding.dense.shape == (0, 32)
    assert encoding.lexical == encoding.colbert == []
    assert encoding.token_counts.shape == encoding.truncated.shape == (0,)


def test_encode_gives_what_is_asked_for_and_nothing_else(tiny: BGEM3Embeddings) -> None:
    encoding = tiny.encode(["free", "and equal"], dense=False, lexical=True)
    assert encoding.dense is None
    assert encoding.colbert is None
    assert all(type(k) is int and type(v) is float for k, v in encoding.lexical[1].items())
    dense = tiny.encode(["free"])
    assert (dense.lexical, dense.colbert, dense.dense.dtype) == (None, None, np.float32)


def test_encode_of_no_output_is_an_error(tiny: BGEM3Embeddings) -> None:
    with pytest.raises(ValueError, match="Set dense, lexical or colbert"):
        tiny.encode(["free"], dense=False)


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["a", None], TypeError, "Text 1 is NoneType, not str"),
        (["a", "b", 3], TypeError, "Text 2 is int, not str"),
        ("abc", TypeError, "single str was passed where a list"),
        (["a", "b\ud800c"], ValueError, "Text 1 has a lone surrogate.*character 1"),
    ],
)
def test_bad_texts_are_named(
    tiny: BGEM3Embeddings, texts: Any, error: type[Exception], words: str
) -> None:
    for method in (tiny.embed_documents, tiny.encode, lambda t: list(tiny.embed_stream(t))):
        with pytest.raises(error, match=words):
            method(texts)


async def test_bad_texts_are_named_in_async_calls_too(tiny: BGEM3Embeddings) -> None:
    with pytest.raises(TypeError, match="Text 200 is NoneType"):
        await tiny.aembed_documents(["a"] * 200 + [None])
    with pytest.raises(TypeError, match="Text 0 is int"):
        await tiny.aembed_query(1)


def test_async_equals_sync(tiny: BGEM3Embeddings) -> None:
    import asyncio

    texts = [f"text {index}" * (index % 7) for index in range(300)]
    vectors = asyncio.run(tiny.aembed_documents(texts))
    np.testing.assert_allclose(vectors, tiny.embed_documents(texts), atol=1e-6)
    assert asyncio.run(tiny.aembed_query("free")) == tiny.embed_query("free")


class TestTruncation:
    LONG = "free " * 600

    def test_a_cut_is_warned_of_with_index_and_count(self, tiny: BGEM3Embeddings) -> None:
        with pytest.warns(UserWarning, match=r"max_length=512 tokens were cut: 1 \(\d,\d{3} tok"):
            encoding = tiny.encode(["short", self.LONG])
        assert encoding.truncated.tolist() == [False, True]
        assert encoding.token_counts[1] > 1_000

    def test_the_warning_points_at_the_caller(self, tiny: BGEM3Embeddings) -> None:
        calls = [
            lambda: tiny.embed_documents([self.LONG]),
            lambda: tiny.embed_query(self.LONG),
            lambda: tiny.encode([self.LONG]),
            lambda: list(tiny.embed_stream([self.LONG])),
        ]
        for call in calls:
            with pytest.warns(UserWarning, match="were cut") as seen:
                call()
            assert [warning.filename for warning in seen] == [__file__]

    def test_it_can_be_refused_before_anything_runs(self, tiny: BGEM3Embeddings) -> None:
        strict = changed(tiny, on_truncate="raise", max_length=10)
        with pytest.raises(ValueError, match=r"Text 2 has 1,\d{3} tokens, more than max_length=10"):
            strict.embed_documents(["a", "b", self.LONG])
        with pytest.raises(ValueError, match="Text 0 has"):
            strict.embed_query(self.LONG)

    def test_it_can_be_ignored(self, tiny: BGEM3Embeddings) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            [vector] = changed(tiny, on_truncate="ignore").embed_documents([self.LONG])
        with pytest.warns(UserWarning, match="were cut"):
            assert tiny.embed_documents([self.LONG]) == [vector]

    def test_more_than_the_positions_is_an_error_with_both_numbers(
        self, tiny: BGEM3Embeddings
    ) -> None:
        with pytest.raises(ValueError, match="max_length=8,192 is more than the 512 positions"):
            changed(tiny, max_length=8_192).load()

    @pytest.mark.parametrize("count", [3, 10, 512])
    def test_exactly_the_limit_is_not_too_long(self, tiny: BGEM3Embeddings, count: int) -> None:
        text, strict = "", changed(tiny, on_truncate="raise", max_length=count)
        while tiny.count_tokens(text) < count - 2:
            text += " a"
        assert tiny.count_tokens(text) == count - 2
        assert strict.encode([text]).truncated.tolist() == [False]
        assert len(strict.embed_query(text)) == 32
        with pytest.raises(ValueError, match=f"Text 0 has {count + 1} tokens, more than max_len"):
            strict.embed_query(f"{text} a")

    def test_the_default_is_all_positions(self, tiny: BGEM3Embeddings) -> None:
        exact = "free " * 255
        while tiny.count_tokens(exact) < 510:
            exact += "a"
        assert tiny.encode([exact[:-1]]).truncated.tolist() == [False]


def test_count_tokens_leaves_the_special_ones_out(tiny: BGEM3Embeddings) -> None:
    texts = ["", "free", "什么是稠密向量?", "free " * 1_000]
    with pytest.warns(UserWarning, match="were cut"):
        counts = tiny.encode(texts).token_counts
    assert [tiny.count_tokens(text) + 2 for text in texts] == counts.tolist()


def test_tokens_reads_lexical_weights(tiny: BGEM3Embeddings) -> None:
    [weights] = tiny.encode(["Everyone has the right to life"], dense=False, lexical=True).lexical
    named = tiny.tokens(weights)
    assert list(named.values()) == sorted(weights.values(), reverse=True)
    assert "right" in named


def test_stream_is_lazy_and_in_order(tiny: BGEM3Embeddings) -> None:
    read = 0

    def texts() -> Any:
        nonlocal read
        for read in itertools.count(1):
            yield f"text {read}"

    stream = tiny.embed_stream(texts())
    first = list(itertools.islice(stream, 3_000))
    stream.close()
    assert read <= 3 * 2_048
    assert first[0].shape == (32,)
    assert first[0].dtype == np.float32
    np.testing.assert_allclose(first[2_999], tiny.embed_query("text 3000"), atol=1e-6)


def test_a_bad_text_in_a_stream_is_named_by_its_place(tiny: BGEM3Embeddings) -> None:
    with pytest.raises(TypeError, match="Text 3000 is NoneType"):
        list(tiny.embed_stream(["a"] * 3_000 + [None]))


def test_instructions_are_put_in_front(tiny: BGEM3Embeddings) -> None:
    told = changed(tiny, query_instruction="find: ", document_instruction="text: ")
    assert told.embed_query("free") == tiny.embed_query("find: free")
    assert told.embed_documents(["free"])[0] == tiny.embed_query("text: free")
    for query in (True, False):
        [vector] = told.encode(["free"], query=query).dense.tolist()
        assert vector == (told.embed_query("free") if query else told.embed_documents(["free"])[0])


def test_a_dense_only_checkpoint_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dense-only"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "sparse_linear.pt").unlink()
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype="float32")
    assert len(embeddings.embed_query("free")) == 32
    for signal in ("lexical", "colbert"):
        with pytest.raises(ValueError, match=r"dense-only checkpoint.*sparse_linear\.pt"):
            embeddings.encode(["free"], **{signal: True})


class TestFields:
    def test_an_unknown_field_is_an_error(self) -> None:
        with pytest.raises(ValidationError, match="max_lenght"):
            BGEM3Embeddings(max_lenght=512)

    def test_fields_cannot_change_under_a_loaded_model(self, tiny: BGEM3Embeddings) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            tiny.max_length = 12

    def test_model_name_is_an_alias(self) -> None:
        assert BGEM3Embeddings(model_name="BAAI/bge-m3") == BGEM3Embeddings()

    def test_every_field_is_documented(self) -> None:
        assert all(field.description for field in BGEM3Embeddings.model_fields.values())

    @pytest.mark.parametrize("fields", [{"max_length": 2}, {"batch_tokens": 0}, {"dtype": "fp16"}])
    def test_impossible_values_are_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            BGEM3Embeddings(**fields)

    def test_the_token_is_not_shown(self) -> None:
        assert "hf_secret" not in repr(BGEM3Embeddings(token="hf_secret"))  # noqa: S106


def test_pickles_and_copies_carry_the_settings_alone(tiny: BGEM3Embeddings) -> None:
    expected = tiny.embed_query("free")
    pickled = pickle.dumps(tiny)
    assert len(pickled) < 2_000
    for other in (pickle.loads(pickled), copy.copy(tiny), copy.deepcopy(tiny), tiny.model_copy()):  # noqa: S301
        assert other._engine is None
        assert other.embed_query("free") == expected


def test_a_copy_with_another_model_does_not_keep_the_first(
    tiny: BGEM3Embeddings, tmp_path: Path
) -> None:
    from tiny_m3 import build

    other = tiny.model_copy(update={"model": str(build(tmp_path / "other", hidden=48))})
    assert (other.dimension, len(other.embed_query("free"))) == (48, 48)


def test_equal_settings_share_one_model(tiny: BGEM3Embeddings) -> None:
    twin = changed(tiny, max_length=100, query_instruction="find: ")
    other = changed(tiny, pooling="mean")
    assert twin.load()._engine is tiny.load()._engine
    assert other.load()._engine is not tiny._engine


def test_close_lets_go_and_a_later_call_loads_again(tiny_checkpoint: Path) -> None:
    embeddings = BGEM3Embeddings(model=tiny_checkpoint, dtype="float32", pooling="mean")
    before = embeddings.embed_query("free")
    embeddings.close()
    embeddings.close()
    assert embeddings.embed_query("free") == before


class TestFingerprint:
    def test_it_names_what_changes_vectors(self, tiny: BGEM3Embeddings) -> None:
        variants = [
            tiny,
            changed(tiny, normalize=False),
            changed(tiny, pooling="mean"),
            changed(tiny, query_instruction="find: "),
            changed(tiny, document_instruction="find: "),
        ]
        assert len({variant.fingerprint for variant in variants}) == len(variants)
        told = changed(tiny, query_instruction="find: ", document_instruction="text: ")
        forms = [
            (tiny, r"tiny-[0-9a-f]{12}-cls"),
            (changed(tiny, pooling="mean", normalize=False), r"tiny-\w{12}-mean-unnormalized"),
            (told, r"tiny-\w{12}-cls-query_[0-9a-f]{8}-document_[0-9a-f]{8}"),
        ]
        for variant, form in forms:
            assert re.fullmatch(form, variant.fingerprint)

    def test_it_can_name_a_folder(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "größe 1: a+b")
        fingerprint = BGEM3Embeddings(model=folder).fingerprint
        assert re.fullmatch(r"[A-Za-z0-9._-]+", fingerprint)
        assert fingerprint != BGEM3Embeddings(model=tiny_checkpoint).fingerprint

    def test_it_does_not_depend_on_dtype_or_device(self, tiny: BGEM3Embeddings) -> None:
        same = changed(tiny, dtype="bfloat16", batch_tokens=7, max_length=100, device="auto")
        assert same.fingerprint == tiny.fingerprint

    def test_it_costs_no_loading(self, tiny_checkpoint: Path) -> None:
        embeddings = BGEM3Embeddings(model=tiny_checkpoint)
        assert embeddings.fingerprint
        assert embeddings.dimension == 32
        assert embeddings._engine is None


def test_progress_is_shown_on_request(
    tiny: BGEM3Embeddings, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.embed_documents(["free"] * 5)
    assert capsys.readouterr() == ("", "")
    changed(tiny, show_progress=True).embed_documents(["free"] * 5)
    assert "5/5" in capsys.readouterr().err
    changed(tiny, show_progress=True).encode(["free"] * 3)
    assert "3/3" in capsys.readouterr().err


def test_one_text_draws_no_bar(tiny: BGEM3Embeddings, capsys: pytest.CaptureFixture[str]) -> None:
    shown = changed(tiny, show_progress=True)
    shown.embed_query("free")
    shown.encode(["free"])
    shown.embed_documents(["free"])
    assert capsys.readouterr() == ("", "")


async def test_without_normalisation_every_method_gives_raw_vectors(tiny: BGEM3Embeddings) -> None:
    raw = changed(tiny, normalize=False)
    expected = raw.encode(["free and equal"]).dense
    assert np.linalg.norm(expected) > 1.5
    for found in (
        raw.embed_documents(["free and equal"]),
        [raw.embed_query("free and equal")],
        await raw.aembed_documents(["free and equal"]),
        [await raw.aembed_query("free and equal")],
        list(raw.embed_stream(["free and equal"])),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    scaled = tiny.embed_query("free and equal")
    np.testing.assert_allclose(expected[0] / np.linalg.norm(expected), scaled, atol=1e-6)


def test_equality_depends_on_the_fields_alone(tiny_checkpoint: Path) -> None:
    one, other = (BGEM3Embeddings(model=tiny_checkpoint, device="cpu") for _ in range(2))
    cache = {one: "found"}
    one.load()
    BGEM3QdrantSparse(one)
    assert one == other
    assert hash(one) == hash(other)
    assert cache[other] == cache[one] == "found"
    assert one != changed(one, max_length=8)
    assert one != one.model_dump()


def test_instructions_of_a_callers_model_are_taken_over(tiny_checkpoint: Path) -> None:

    flag = flag_model(
        tiny_checkpoint,
        query_instruction_for_retrieval="find",
        query_instruction_format="<{}> {}",
    )
    embeddings = BGEM3Embeddings.from_flag_model(flag)
    assert embeddings.query_instruction == "<find> "
    expected = flag.encode_queries(["free"])["dense_vecs"][0]
    np.testing.assert_allclose(embeddings.embed_query("free"), expected, atol=1e-6)
    flag.query_instruction_format = "{} {} please"
    with pytest.raises(ValueError, match="please"):
        BGEM3Embeddings.from_flag_model(flag)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_kwargs": {"device": "cpu"}}, "has no field model_kwargs. Instead of model_kwargs"),
        ({"model_kwargs": {}}, "use device, dtype, revision, token, local_files_only."),
        ({"encode_kwargs": {}}, "Instead of encode_kwargs use normalize, batch_tokens,"),
        ({"use_fp16": True}, 'Instead of use_fp16 use dtype="float16".'),
        ({"normalize_embeddings": True}, "Instead of normalize_embeddings use normalize."),
        ({"devices": "cuda:0", "batch_size": 8}, "use device. Instead of batch_size use batch_tok"),
        ({"trust_remote_code": True}, "Leave trust_remote_code out."),
    ],
)
def test_keywords_of_others_are_answered_with_the_field_here(
    fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        BGEM3Embeddings(**fields)


def test_every_keyword_of_others_has_an_answer() -> None:
    flag = set(inspect.signature(flag_model_class().__init__).parameters) - {"self", "kwargs"}
    hugging_face = {"model_name", "cache_folder", "show_progress", "multi_process"}
    hugging_face |= {"model_kwargs", "encode_kwargs", "query_encode_kwargs"}
    foreign = (flag | hugging_face) - {"model_name", *BGEM3Embeddings.model_fields}
    assert len(foreign) > 15
    for name in foreign:
        with pytest.raises(
            ValidationError, match=rf"has no field {name}\. (Instead of|Leave) {name}"
        ):
            BGEM3Embeddings(**{name: None})


@pytest.mark.parametrize("fields", [{"base_url": "http://h"}, {"use_fp16": True}])
def test_an_error_does_not_tell_secrets(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        BGEM3Embeddings(token="hf_secret", **fields)  # noqa: S106
    assert "hf_secret" not in str(caught.value)


async def test_passages_of_a_generator(tiny: BGEM3Embeddings) -> None:
    expected = tiny.embed_documents(["free", "equal"])
    assert tiny.embed_documents(text for text in ("free", "equal")) == expected
    assert await tiny.aembed_documents(text for text in ("free", "equal")) == expected
