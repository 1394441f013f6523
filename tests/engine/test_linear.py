"""Linear layers: oneDNN's products against plain ones, and int8 against what it stands for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from langchain_bge_dense._engine import linear, loading
from langchain_bge_dense._engine.checkpoint import read_checkpoint
from langchain_bge_dense._engine.linear import (
    LinearFactory,
    PackedLinear,
    PlainInt8Linear,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
# Dtype of products and of states, and how far from the exact product a result may be, as a part of
# the largest.
KINDS = [
    ("float32", torch.float32, 1e-6),
    ("bfloat16", torch.bfloat16, 0.02),
    ("int8", torch.float32, 0.02),
    ("int8", torch.bfloat16, 0.03),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).abs().max() / exact.abs().max())


@pytest.fixture(autouse=True)
def choice() -> Iterator[None]:
    """The layers of this process are chosen anew by each test."""
    linear._packed.cache_clear()
    yield
    linear._packed.cache_clear()


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of PyTorch that lacks oneDNN's operators."""

    class Missing:
        def __getattr__(self, name: str) -> None:
            msg = f"'_OpNamespace' object has no attribute '{name}'"
            raise AttributeError(msg)

    monkeypatch.setattr(torch.ops, "mkldnn", Missing())
    monkeypatch.setattr(torch.ops, "onednn", Missing())
    monkeypatch.setattr(torch.ops, "quantized", Missing())
    linear._packed.cache_clear()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "state_dtype", "tolerance"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_products_are_those_of_float32(
    dtype: str, state_dtype: torch.dtype, tolerance: float, rows: int, *, gelu: bool
) -> None:
    weight, bias, x = draw(24, 40), draw(24, seed=1), draw(rows, 40, seed=2)
    exact = F.linear(x, weight, bias)
    layer = LinearFactory(dtype, CPU, state_dtype)(weight, bias, gelu=gelu)
    found = layer(x)
    assert found.dtype == state_dtype
    assert difference(found, F.gelu(exact) if gelu else exact) < tolerance
    assert torch.equal(layer(x), found)  # x, weight and bias are as they were


def require_operator(dtype: str, state_dtype: torch.dtype) -> None:
    """Skip where this PyTorch or this CPU cannot have the packed product."""
    old = torch.__version__ < "2.8"  # has the int8 product for unsigned numbers alone
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if (dtype == "int8" and old) or (state_dtype == torch.bfloat16 and not bf16):
        pytest.skip(f"there is no packed product in {dtype} here")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "state_dtype", "_"), KINDS)
def test_without_the_operators_results_are_the_same(
    dtype: str,
    state_dtype: torch.dtype,
    _: float,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    *,
    gelu: bool,
) -> None:
    require_operator(dtype, state_dtype)
    weight, bias, x = draw(24, 40), draw(24, seed=1), draw(9, 40, seed=2).to(state_dtype)
    packed = LinearFactory(dtype, CPU, state_dtype)(weight, bias, gelu=gelu)
    expected = packed(x).float()
    assert not caplog.records
    request.getfixturevalue("without_operators")
    plain = LinearFactory(dtype, CPU, state_dtype)(weight, bias, gelu=gelu)
    assert type(plain) is not type(packed)
    if isinstance(packed, linear.PlainInt7Linear):
        plain = linear.PlainInt7Linear(weight, bias, state_dtype, gelu=gelu)
    assert difference(plain(x), expected) <= linear.tolerance(state_dtype)
    [record] = caplog.records
    assert "no usable oneDNN product" in record.getMessage()
    assert "has no attribute" in record.getMessage()
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize(("dtype", "state_dtype", "_"), KINDS)
def test_a_table_without_operators_needs_none(
    dtype: str,
    state_dtype: torch.dtype,
    _: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(linear, "_PACKED", {})
    layer = LinearFactory(dtype, CPU, state_dtype)(draw(24, 40), draw(24))
    assert type(layer).__name__ == ("PlainInt8Linear" if dtype == "int8" else "PlainLinear")
    assert not caplog.records


@pytest.mark.parametrize("factor", [1.01, float("nan"), -1.0])
@pytest.mark.parametrize(("dtype", "state_dtype", "_"), KINDS)
def test_a_wrong_product_is_noticed(
    dtype: str,
    state_dtype: torch.dtype,
    _: float,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    require_operator(dtype, state_dtype)
    packed, plain = linear._PACKED["cpu", dtype][-1]

    class Wrong(packed):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * factor

    if state_dtype == torch.bfloat16 and factor == 1.01:
        factor = 1.1  # 1 % is what bfloat16 may be off by
    monkeypatch.setitem(linear._PACKED, ("cpu", dtype), [(Wrong, plain)])
    layer = LinearFactory(dtype, CPU, state_dtype)(draw(24, 40), draw(24))
    assert not isinstance(layer, Wrong)
    assert "a product differs by" in caplog.text


def test_where_int8_products_overflow_tokens_have_seven_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU without VNNI: sums of two products are cut to 16 bits."""

    def product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pairs = (codes[:, None] * weight).unflatten(2, (-1, 2)).sum(3)  # (S, N, K / 2)
        return pairs.clamp_(-(2**15), 2**15 - 1).sum(2)

    class Overflowing(PlainInt8Linear):
        def _product(self, codes: torch.Tensor) -> torch.Tensor:
            weight = self._codes.float()
            summed = product(codes.float() + 128, weight) - 128 * weight.sum(1)
            return (summed * self._scales).to(self._bias.dtype)

    class Fitting(linear.PlainInt7Linear):
        def _product(self, codes: torch.Tensor) -> torch.Tensor:
            return product(codes.round(), self._codes.float()) * self._scales

    kinds = [(Overflowing, PlainInt8Linear), (Fitting, linear.PlainInt7Linear)]
    monkeypatch.setitem(linear._PACKED, ("cpu", "int8"), kinds)
    weight, x = draw(24, 40), draw(3, 40, seed=2)
    weight[0], x[0] = 1, 3.0
    layer = LinearFactory("int8", CPU, torch.float32)(weight, torch.zeros(24))
    assert type(layer) is Fitting
    assert not caplog.records
    assert difference(layer(x), F.linear(x, weight)) < 0.03


@pytest.mark.parametrize("kind", [linear.PackedInt7Linear, linear.FbgemmInt7Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_of_seven_bits_are_the_plain_ones(kind: type, dtype: torch.dtype) -> None:
    """On every CPU, although those with VNNI take 8 bits."""
    require_operator("int8", torch.float32)
    weight, bias, x = draw(300, 64), draw(300, seed=1), draw(9, 64, seed=2).to(dtype)
    layers = [each(weight, bias, dtype, gelu=False) for each in (kind, linear.PlainInt7Linear)]
    found, plain = (layer(x) for layer in layers)
    assert found.dtype == dtype
    assert difference(found, plain.float()) <= linear.tolerance(dtype)


@pytest.mark.parametrize("kind", [linear.PackedInt7Linear, linear.FbgemmInt7Linear])
def test_numbers_far_from_zero_have_as_many_steps(kind: type) -> None:
    require_operator("int8", torch.float32)
    weight = draw(300, 64).mul(40).round().clamp_(-127, 127)
    weight[:, 0] = 127  # so that no weight is rounded
    x = draw(9, 64, seed=2).mul(64).round().div(64)  # so that adding 30 rounds none
    layer = kind(weight, torch.zeros(300), torch.float32, gelu=False)
    assert difference(layer(x + 30) - 30 * weight.sum(1), layer(x)) < 1e-5


def test_float16_and_other_devices_take_the_plain_product() -> None:
    layer = LinearFactory("float16", CPU)(draw(24, 40), draw(24))
    assert layer(draw(3, 40)).dtype == torch.float16
    meta = LinearFactory("float32", torch.device("meta"))(draw(24, 40), draw(24))
    assert not isinstance(meta, PackedLinear)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_layer_shares_no_memory_with_the_weights_it_is_made_of(
    dtype: str, monkeypatch: pytest.MonkeyPatch, *, plain: bool
) -> None:
    """A view would keep the checkpoint's file mapped, and change with a caller's own model."""
    if plain:
        monkeypatch.setattr(linear, "_PACKED", {})
    state_dtype = torch.float32 if dtype == "int8" else None
    weight, bias, x = draw(24, 40), draw(24), draw(3, 40)
    layer = LinearFactory(dtype, CPU, state_dtype)(weight, bias)
    before = layer(x).clone()
    weight.fill_(7)
    bias.fill_(7)
    assert torch.equal(layer(x), before)


class TestInt8:
    """One scale a weight row, one scale a token."""

    @staticmethod
    def layer(weight: torch.Tensor, dtype: torch.dtype, *, plain: bool):
        if plain:
            return PlainInt8Linear(weight, torch.zeros(len(weight)), dtype, gelu=False)
        return LinearFactory("int8", CPU, dtype)(weight, torch.zeros(len(weight)))

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_and_tokens_of_any_size_keep_their_precision(
        self, dtype: torch.dtype, *, plain: bool
    ) -> None:
        weight, x = draw(300, 40), draw(9, 40, seed=2)
        layer, exact = self.layer(weight, dtype, plain=plain), F.linear(x, weight)
        small = 10.0 ** torch.linspace(-6, 4, 300)[:, None]  # of weight rows
        large = 10.0 ** torch.linspace(-5, 3, 9)[:, None]  # of tokens
        scaled = self.layer(weight * small, dtype, plain=plain)((x * large).to(dtype))
        assert difference(scaled.float() / small.T / large, exact) < 0.03
        assert difference(layer(x.to(dtype)), exact) < 0.03

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_and_tokens_of_zeros_give_zero(self, dtype: torch.dtype, *, plain: bool) -> None:
        weight, x = draw(24, 40), draw(9, 40, seed=2).to(dtype)
        weight[3] = x[5] = 0
        found = self.layer(weight, dtype, plain=plain)(x)
        assert not found[:, 3].any()
        assert not found[5].any()
        assert found[4, 4] != 0

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_values_stay_so_and_in_their_row(
        self, bad: float, dtype: torch.dtype, *, plain: bool
    ) -> None:
        x = draw(9, 40).to(dtype)
        x[5, 7] = bad
        layer = self.layer(draw(24, 40), dtype, plain=plain)
        finite = layer(x).isfinite()
        assert not finite[5].any()
        assert finite.sum() == 8 * 24

    @given(
        mantissa=st.integers(128, 255),
        exponent=st.integers(-40, 40),
        sign=st.sampled_from([1, -1]),
        dtypes=st.sampled_from(
            [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)]
        ),
    )
    def test_the_largest_number_of_a_token_keeps_its_sign(
        self, mantissa: int, exponent: int, sign: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        given_dtype, dtype = dtypes
        peak = sign * mantissa * 2.0**exponent
        x = torch.tensor([[peak, peak / 3, 0.0, -peak]], dtype=given_dtype)
        for plain in (False, True):
            found = self.layer(torch.eye(4), dtype, plain=plain)(x).float() / peak
            assert found[0].tolist() == pytest.approx([1, 1 / 3, 0, -1], abs=0.02)


@pytest.mark.usefixtures("without_operators")
def test_a_missing_product_is_told_once_for_a_model(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint, "tiny")
    for _ in range(2):
        loading.load_encoder(checkpoint, "cpu", "bfloat16")
    told = [line for line in caplog.messages if "no usable oneDNN product for bfloat16" in line]
    assert len(told) == 1
