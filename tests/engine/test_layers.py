"""Layers without padding against transformers' own modules, which pad."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from calls import lowest_int8_cosine
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from langchain_bge_dense._engine import layers, linear
from langchain_bge_dense._engine.layers import (
    MODEL_TYPES,
    PackedEncoder,
    PaddedEncoder,
    Shape,
    attention_over,
    converted,
    module_weights,
)
from langchain_bge_dense._engine.linear import LinearFactory

CPU = torch.device("cpu")
PADDING, WORDS, POSITIONS = 1, 50, 100
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS + PADDING + 1,
    "pad_token_id": PADDING,
}
PACKED = {
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    "roberta": (RobertaConfig, RobertaModel),
    "camembert": (CamembertConfig, CamembertModel),
    "bert": (BertConfig, BertModel),
}
DTYPES = {
    "float32": ("float32", torch.float32),
    "bfloat16": ("bfloat16", torch.bfloat16),
    "int8 beside float32": ("int8", torch.float32),
    "int8 beside bfloat16": ("int8", torch.bfloat16),
}
LOWEST_COSINE = {"float32": 0.9999999, "bfloat16": 0.999, "int8": lowest_int8_cosine()}

# Token ids of a batch, `<pad>` spelled out among them; many short texts, few long ones.
Text = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=POSITIONS)
Batch = st.one_of(
    st.lists(Text, min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=40),
).map(lambda texts: [np.array(ids, dtype=np.int32) for ids in texts])


def spread(module: torch.nn.Module) -> Any:
    """Weights so large that tokens and texts end far from one another."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(generator=generator)
            if weight.dim() == 1:
                weight.mul_(0.1).add_("LayerNorm.weight" in name)
            elif "embeddings" not in name:
                weight.mul_(1.5 / weight.shape[1] ** 0.5)
    return module.eval()


@cache
def reference(kind: str) -> Any:
    config, model = PACKED[kind]
    return spread(model(config(**SMALL), add_pooling_layer=False))


def packed_of(module: Any, dtype: str, state_dtype: torch.dtype) -> PackedEncoder:
    linear = LinearFactory(dtype, CPU, state_dtype)
    return PackedEncoder(Shape.of(module), converted(module_weights(module), linear), linear)


@cache
def packed(kind: str, dtype: str, *, plain: bool = False) -> PackedEncoder:
    operators = dict(linear._PACKED)
    if plain:
        linear._PACKED.clear()
    try:
        return packed_of(reference(kind), *DTYPES[dtype])
    finally:
        linear._PACKED.update(operators)


@torch.inference_mode()
def states_of(module: Any, batch: list[np.ndarray]) -> torch.Tensor:
    """What transformers gives, `(S, D)`; text by text, so that nothing is padded."""
    parts = [
        module(torch.from_numpy(ids)[None].long(), torch.ones(1, len(ids)).long()) for ids in batch
    ]
    return torch.cat([part.last_hidden_state[0] for part in parts])


@torch.inference_mode()
def run(encoder: torch.nn.Module, batch: list[np.ndarray]) -> torch.Tensor:
    states = encoder(batch)
    assert states.dtype == torch.float32
    assert states.shape == (sum(map(len, batch)), 32)
    return states


def cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(found, expected, dim=1)


@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=40)
@given(batch=Batch)
def test_packed_states_are_those_of_transformers(kind: str, batch: list[np.ndarray]) -> None:
    expected = states_of(reference(kind), batch)
    for plain in (False, True):
        found = run(packed(kind, "float32", plain=plain), batch)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
@settings(max_examples=20)
@given(batch=Batch)
def test_packed_states_in_narrow_dtypes_stay_close(
    kind: str, dtype: str, batch: list[np.ndarray]
) -> None:
    found = cosines(run(packed(kind, dtype), batch), states_of(reference(kind), batch))
    assert found.min() > LOWEST_COSINE[dtype.split(maxsplit=1)[0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_of_a_batch_do_not_see_each_other(dtype: str) -> None:
    encoder = packed("xlm-roberta", dtype)
    ids = [np.arange(4, 4 + length, dtype=np.int32) for length in (5, 30, 2, 31, 3)]
    others = [ids[0], ids[1][::-1].copy(), ids[2][::-1].copy(), ids[3] + 1, ids[4]]
    ours, theirs = run(encoder, ids), run(encoder, others)
    torch.testing.assert_close(ours[:5], theirs[:5], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[-3:], theirs[-3:], atol=1e-6, rtol=0)
    assert not torch.allclose(ours[5:-3], theirs[5:-3], atol=0.1)


def test_a_model_that_is_rebuilt_stays_as_it_was() -> None:
    module = reference("bert")
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    encoder = packed_of(module, "int8", torch.bfloat16)
    run(encoder, [np.arange(20, dtype=np.int32)])
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())


@pytest.mark.parametrize(
    ("config", "supported"),
    [
        *((config(**SMALL), True) for config, _ in PACKED.values()),
        (BertConfig(**SMALL, hidden_act="gelu_new"), False),
        (BertConfig(**SMALL, hidden_act="relu"), False),
        (BertConfig(**SMALL, is_decoder=True), False),
        (DistilBertConfig(), False),
        (MPNetConfig(), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_the_layers_can_compute(config: Any, *, supported: bool) -> None:
    assert PackedEncoder.supports(config) == supported


def test_relative_positions_are_not_supported() -> None:
    config = BertConfig(**SMALL)
    config.position_embedding_type = "relative_key"
    assert not PackedEncoder.supports(config)


def test_every_type_of_the_list_is_held_against_transformers() -> None:
    assert set(MODEL_TYPES) == set(PACKED)


def distilbert() -> Any:
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=WORDS,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=POSITIONS,
            pad_token_id=PADDING,
        )
    )


def mpnet() -> Any:
    return MPNetModel(MPNetConfig(**SMALL), add_pooling_layer=False)


@cache
def other(make: Any) -> Any:
    return spread(make())


@pytest.mark.parametrize("make", [distilbert, mpnet])
@settings(max_examples=30)
@given(batch=Batch)
def test_types_that_are_not_packed_run_by_their_own_module(
    make: Any, batch: list[np.ndarray]
) -> None:
    found = run(PaddedEncoder(other(make), PADDING), batch)
    torch.testing.assert_close(found, states_of(other(make), batch), atol=2e-5, rtol=1e-5)


def test_a_device_of_another_kind_has_an_attention() -> None:
    attention = attention_over([3, 4, 600], torch.device("meta"), torch.float32)
    assert attention(torch.empty(607, 96, device="meta"), 4).shape == (607, 32)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_attention_is_that_of_each_text_alone(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * 32, generator=generator)
    found = attention_over(lengths, CPU, torch.float32)(qkv, 4)
    alone = [
        attention_over([length], CPU, torch.float32)(part, 4)
        for length, part in zip(lengths, torch.split(qkv, lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_offset", [0, 4, -4])
@pytest.mark.parametrize("length", [256, 300, 5_000])
def test_long_texts_attend_by_bfloat16_products_as_by_flash_attention(
    length: int, key_offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With large scores, and keys far from zero, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(length, 3, 32, generator=generator) * torch.tensor([[3], [1], [1]])
    parts[:, 0] += 1
    parts[:, 1] += key_offset
    states = parts.reshape(length, 96).to(torch.bfloat16)
    exact = attention_over([length], CPU, torch.float32)(states.float(), 4)
    monkeypatch.setattr(layers, "ATTENTION_BY_PRODUCTS", True)
    found = attention_over([length], CPU, torch.bfloat16)(states, 4).float()
    assert (found - exact).norm() < 0.004 * exact.norm()
