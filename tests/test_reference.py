"""The fidelity rule: in float32 every output equals `BGEM3FlagModel`'s on the same checkpoint."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from reference import flag_model

from langchain_bge_dense import BGEM3Embeddings, M3Encoding

if TYPE_CHECKING:
    from pathlib import Path

    from FlagEmbedding import BGEM3FlagModel

WORDS = [
    "free",
    "equal",
    "dignity",
    "人人生而自由",
    "向量检索",
    "الحقوق",
    "والكرامة",
    "Würde",
    "égaux",
    "😀",
    "🎉",
    "1,024",
]
PROSE = [
    "The river Inn rises near the Maloja Pass; its glaciers are shrinking.",
    "An embedding turns a passage of text into a dense vector of numbers.",
    "Spare part QX-7731 fits the older model.",
    "稠密向量把整段文字的意思压缩成一串数字；稀疏权重给每个词元一个分数。",
]
POSITIONS = 512
ODD = [
    "",
    " ",
    "\0",
    "a\0b",
    "\n\t",
    "the the the the the",
    "人人人人",
    "<pad> <s> </s> <unk> <mask>",
    "👩‍👩‍👧‍👦 e\u0301 \u200b\ufeff",
    "long " * 3_000,
    "很长的文本。" * 2_000,
]


def corpus() -> list[str]:
    """Texts of every length around the batch limits, and the odd ones."""
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(WORDS, k=length)) for length in range(0, 160, 3)]
    return texts + ODD


@pytest.fixture(scope="module")
def flag(tiny_checkpoint: Path) -> BGEM3FlagModel:
    return flag_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def reference(flag: BGEM3FlagModel) -> dict[str, list]:
    # One by one: with its batches of 256 every short text would be padded to the longest.
    outputs = [
        flag.encode(
            [text],
            max_length=POSITIONS,
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )
        for text in corpus()
    ]
    return {key: [output[key][0] for output in outputs] for key in outputs[0]}


def encode(embeddings: BGEM3Embeddings, texts: list[str]) -> M3Encoding:
    embeddings = embeddings.model_copy(update={"on_truncate": "ignore"})
    return embeddings.encode(texts, lexical=True, colbert=True)


def assert_equal(encoding: M3Encoding, reference: dict[str, list], order: list[int]) -> None:
    for row, index in enumerate(order):
        expected = reference["dense_vecs"][index]
        assert encoding.dense[row] @ expected >= 0.999999
        np.testing.assert_allclose(encoding.dense[row], expected, atol=1e-5)
        weights = {int(key): value for key, value in reference["lexical_weights"][index].items()}
        assert encoding.lexical[row].keys() == weights.keys()
        assert encoding.lexical[row] == pytest.approx(weights, abs=1e-5)
        colbert = reference["colbert_vecs"][index]
        assert encoding.colbert[row].shape == colbert.shape
        np.testing.assert_allclose(encoding.colbert[row], colbert, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 64, 512, 100_000])
def test_outputs_equal_the_reference_with_every_budget(
    tiny: BGEM3Embeddings, reference: dict[str, list], batch_tokens: int
) -> None:
    texts = corpus()
    encoding = encode(tiny.model_copy(update={"batch_tokens": batch_tokens}), texts)
    assert_equal(encoding, reference, list(range(len(texts))))


def test_order_changes_nothing(tiny: BGEM3Embeddings, reference: dict[str, list]) -> None:
    texts = corpus()
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    assert_equal(encode(tiny, [texts[index] for index in order]), reference, order)


def test_one_by_one_equals_all_at_once(tiny: BGEM3Embeddings) -> None:
    texts = corpus()
    together = encode(tiny, texts)
    for index, text in enumerate(texts):
        alone = encode(tiny, [text])
        np.testing.assert_allclose(alone.dense[0], together.dense[index], atol=1e-6)
        assert alone.lexical[0] == pytest.approx(together.lexical[index], abs=1e-6)
        np.testing.assert_allclose(alone.colbert[0], together.colbert[index], atol=1e-5)
        assert alone.token_counts[0] == together.token_counts[index]


def test_tokens_and_cuts_equal_the_tokenizers_own(
    tiny: BGEM3Embeddings, flag: BGEM3FlagModel
) -> None:
    texts = corpus()
    for max_length in (3, 17, POSITIONS):
        settings = {"max_length": max_length, "on_truncate": "ignore"}
        embeddings = tiny.model_copy(update=settings)
        encoder = embeddings.load()._engine.encoder
        cut = flag.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        whole = flag.tokenizer(texts)["input_ids"]
        ours = encoder.tokenize(texts, max_length)
        assert [tokens.ids.tolist() for tokens in ours] == cut
        encoding = embeddings.encode(texts)
        assert encoding.token_counts.tolist() == [len(ids) for ids in whole]
        assert encoding.truncated.tolist() == [len(ids) > max_length for ids in whole]


def test_without_normalisation_vectors_have_the_references_length(tiny_checkpoint: Path) -> None:
    flag = flag_model(tiny_checkpoint, normalize_embeddings=False)
    expected = flag.encode(["free and equal"], return_colbert_vecs=True)
    ours = BGEM3Embeddings(
        model=tiny_checkpoint, device="cpu", dtype="float32", normalize=False
    ).encode(["free and equal"], colbert=True)
    np.testing.assert_allclose(ours.dense[0], expected["dense_vecs"][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.colbert[0], expected["colbert_vecs"][0], rtol=1e-3, atol=1e-5)


def test_a_callers_own_model_gives_the_same_and_stays_usable(
    flag: BGEM3FlagModel, reference: dict[str, list]
) -> None:
    texts = corpus()
    embeddings = BGEM3Embeddings.from_flag_model(flag, on_truncate="ignore")
    encoding = embeddings.encode(texts, lexical=True, colbert=True)
    assert_equal(encoding, reference, list(range(len(texts))))
    again = flag.encode(["free"], max_length=POSITIONS)["dense_vecs"][0]
    np.testing.assert_allclose(again, embeddings.embed_query("free"), atol=1e-6)


def test_outputs_of_real_weights_equal_the_reference(
    prompted: BGEM3Embeddings, small_checkpoint: Path
) -> None:
    flag = flag_model(small_checkpoint, pooling_method="mean")
    outputs = [
        flag.encode([f"passage: {text}"], return_sparse=True, return_colbert_vecs=True)
        for text in PROSE
    ]
    expected = {key: [output[key][0] for output in outputs] for key in outputs[0]}
    assert_equal(encode(prompted, PROSE), expected, list(range(len(PROSE))))


LOWEST_COSINE = {"bfloat16": 0.999, "float16": 0.99999, "int8": 0.99}


@pytest.mark.parametrize("dtype", LOWEST_COSINE)
def test_narrow_dtypes_stay_close(tiny: BGEM3Embeddings, dtype: str) -> None:
    exact = encode(tiny, corpus())
    narrow = encode(tiny.model_copy(update={"dtype": dtype}), corpus())
    assert_close(narrow, exact, dtype)
    assert not np.array_equal(narrow.dense, exact.dense)
    found, expected = (
        [
            weights.get(key, 0.0)
            for weights, keys in zip(each, exact.lexical, strict=True)
            for key in keys
        ]
        for each in (narrow.lexical, exact.lexical)
    )
    np.testing.assert_allclose(found, expected, atol=0.1)


@pytest.mark.parametrize("dtype", LOWEST_COSINE)
def test_narrow_dtypes_stay_close_on_real_weights(prompted: BGEM3Embeddings, dtype: str) -> None:
    # A text without tokens is the worst one: in int8 its cosine is 0.98.
    texts = [text for text in corpus()[::4] if prompted.count_tokens(text)] + PROSE
    narrow = prompted.model_copy(update={"dtype": dtype})
    assert_close(encode(narrow, texts), encode(prompted, texts), dtype)


def assert_close(found: M3Encoding, exact: M3Encoding, dtype: str) -> None:
    """Dense vectors, and those of tokens, of which the worst of thousands is allowed more."""
    assert (found.dense * exact.dense).sum(-1).min() > LOWEST_COSINE[dtype]
    tokens = (np.concatenate(found.colbert) * np.concatenate(exact.colbert)).sum(-1)
    assert tokens.min() > 1 - 3 * (1 - LOWEST_COSINE[dtype])
