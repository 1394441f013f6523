"""One linear layer in every dtype, by the fastest product that this build of PyTorch has.

The oneDNN operators are the ones that PyTorch's own compiler emits. They are not part of its public
face, so they are looked up here alone, and tried on a small product before they are relied on.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Linear = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)

AMX = torch.cpu._is_amx_tile_supported()  # noqa: SLF001


def cpu_is_fast_in_bf16() -> bool:
    """Tell whether bfloat16 products are faster than float32 ones on this CPU.

    PyTorch emulates what a CPU lacks. Intel's cores since Sapphire Rapids, which have AVX512-FP16,
    compute bfloat16 at half of float32's rate but by AMX, which a virtual machine may hide
    (`benchmarks/encode.py`; https://github.com/libxsmm/tpp-mlir/pull/1025). oneDNN, which
    multiplies, can be told by ONEDNN_MAX_CPU_ISA to use less than the CPU has.
    """
    mkldnn: Any = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()):  # type: ignore[no-untyped-call]  # noqa: SLF001
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch, which knows no Arm
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    has = torch.cpu.get_capabilities().get
    slow = has("avx512_fp16") and not has("sse4a")  # which AMD's have
    return bool(has("amx_bf16") or has("bf16") or (has("avx512_bf16") and not slow))


# PyTorch's flash attention makes use of AMX, but not of other bfloat16 products: without AMX long
# texts attend by products (layers.py).
ATTENTION_BY_PRODUCTS = cpu_is_fast_in_bf16() and not AMX

# A product is compiled for each number of rows, and oneDNN and PyTorch keep up to 1,024 of them:
# about 5 MiB a size of batch (`test_memory_of_many_sizes` prints it). Both read their limit at
# their first product. A batch needs six, and up to eighteen with attention by products.
for _limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "24" if ATTENTION_BY_PRODUCTS else "8")

_TOKEN_PEAK = 126  # bfloat16 may round a code of 127 up to 128, which int8 takes for -128
_WEIGHT_PEAK = 127  # symmetric: -128 is not used
_SMALLEST_PEAK = 1e-30  # of a row of zeros, which divides nothing
_ROWS = 256  # of a weight quantised at once: what is left of larger copies stays in the heap


class Quantized(NamedTuple):
    """A weight in codes of 8 bits or fewer."""

    codes: Tensor  # (N, K), int8
    scales: Tensor  # (N,), float32


class LinearFactory:
    """Make the linear layers of one model.

    Args:
        dtype: Dtype of the products: `"float32"`, `"bfloat16"`, `"float16"`, `"int8"`.
        device: Where weights are kept.
        state_dtype: Dtype of a layer's outputs, by default that of the products. Inputs are of
            this dtype or float32.
    """

    def __init__(
        self, dtype: str, device: torch.device, state_dtype: torch.dtype | None = None
    ) -> None:
        self.device = device
        self.state_dtype = state_dtype = state_dtype or getattr(torch, dtype)
        self._kind = _packed(device.type, dtype, state_dtype) or _PLAIN.get(dtype, PlainLinear)
        self.form = f"{self._kind.__name__} {state_dtype}"  # names what `convert` makes

    def convert(self, weight: Tensor) -> Tensor | Quantized:
        """Convert a weight to the form of a layer of this dtype, and of a packed file."""
        converted: Tensor | Quantized = self._kind.convert(weight, self.state_dtype)
        return converted

    def __call__(self, weight: Tensor | Quantized, bias: Tensor, *, gelu: bool = False) -> Linear:
        """Make a layer that gives `x W^T + b`, `(S, K)` to `(S, N)`.

        Args:
            weight: W, `(N, K)`, in a float dtype or as `convert` gives it.
            bias: b, `(N,)`, float32.
            gelu: Whether GELU follows.
        """
        if isinstance(weight, Tensor):
            weight = weight.detach().to(self.device)
        bias = bias.detach().to(self.device)
        layer: Linear = self._kind(weight, bias, self.state_dtype, gelu=gelu)
        return layer


class PlainLinear:
    """`torch.nn.functional.linear`, for every device and float dtype."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, gelu: bool) -> None:
        self._weight = weight.to(dtype, copy=True)  # not a view that would keep the file mapped
        self._bias = bias.to(dtype, copy=True)
        self._gelu = gelu

    def __call__(self, x: Tensor) -> Tensor:
        product = F.linear(x.to(self._weight.dtype), self._weight, self._bias)  # (S, N)
        return F.gelu(product) if self._gelu else product

    @staticmethod
    def convert(weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast a weight to the dtype of the product."""
        return weight.to(dtype)


class PackedLinear:
    """oneDNN's product with weights in the order of its kernel; float32 and bfloat16 on a CPU."""

    convert = PlainLinear.convert

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, gelu: bool) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))  # noqa: SLF001
        self._bias = bias.to(dtype, copy=True)
        self._dtype = dtype
        self._gelu = ("gelu", "none") if gelu else ("none", "")

    def __call__(self, x: Tensor) -> Tensor:
        function, algorithm = self._gelu
        linear: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        product: Tensor = linear(
            x.to(self._dtype), self._weight, self._bias, function, [], algorithm
        )  # (S, N)
        return product


class PlainInt8Linear:
    """Products of int8 codes: one scale a weight row, one scale a token computed at run time."""

    def __init__(
        self, weight: Tensor | Quantized, bias: Tensor, dtype: torch.dtype, *, gelu: bool
    ) -> None:
        codes, scales = self.convert(weight, dtype) if isinstance(weight, Tensor) else weight
        self._scales = scales.clone()  # (N,)
        self._pack(codes)
        self._bias = bias.to(dtype, copy=True)
        self._gelu = gelu

    @staticmethod
    def convert(weight: Tensor, _dtype: torch.dtype) -> Quantized:
        """Quantise a weight, each row by its own scale."""
        peaks = torch.cat([rows.abs().amax(1) for rows in torch.split(weight, _ROWS)])  # (N,)
        scales = peaks.clamp_(min=_SMALLEST_PEAK).div_(_WEIGHT_PEAK)  # (N,)
        rows = zip(torch.split(weight, _ROWS), torch.split(scales, _ROWS), strict=True)
        codes = [(w / s[:, None]).round_().to(torch.int8) for w, s in rows]
        return Quantized(torch.cat(codes), scales)

    def _pack(self, codes: Tensor) -> None:
        self._codes = codes.clone()  # (N, K)

    def _product(self, codes: Tensor) -> Tensor:
        """Multiply codes, and scale by the weights, `(S, K)` to `(S, N)`."""
        product = F.linear(codes.float(), self._codes.float()) * self._scales
        return product.to(self._bias.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        peak = x.abs().amax(1, keepdim=True)  # (S, 1)
        # Rounded to the dtype first, so that codes and scale belong together to the last bit.
        scale = peak.div_(_TOKEN_PEAK).clamp_(min=_SMALLEST_PEAK).to(self._bias.dtype)  # (S, 1)
        codes = (x * scale.float().reciprocal().to(x.dtype)).round_().to(torch.int8)  # (S, K)
        product = self._product(codes)  # (S, N)
        torch.addcmul(self._bias, product, scale, out=product)
        return F.gelu(product) if self._gelu else product


class PackedInt8Linear(PlainInt8Linear):
    """The same by oneDNN's int8 product.

    Its kernels take signed codes with AMX, and unsigned ones without: there it would reorder the
    weights for each product of signed codes.
    """

    _zero = 0 if AMX else 128
    """The code that stands for 0."""

    def _pack(self, codes: Tensor) -> None:
        self._codes = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(len(codes), dtype=torch.int32)  # (N,)

    def _product(self, codes: Tensor) -> Tensor:
        linear: Any = torch.ops.onednn.qlinear_pointwise
        weights = (self._codes, self._scales, self._zeros)
        dtype = self._bias.dtype
        if self._zero:
            codes = codes.view(torch.uint8).bitwise_xor_(self._zero)  # adds 128
        product: Tensor = linear(
            codes, 1.0, self._zero, *weights, None, 1.0, 0, dtype, "none", [], ""
        )
        return product


class PlainInt7Linear(PlainInt8Linear):
    """The same with 7 bits a token, from its smallest number to its largest one.

    CPUs without VNNI add two products in 16 bits: with a code from 0 to 127 and a weight up to 127
    the sum fits, as 2 * 127^2 < 2^15, and with larger ones it is cut off.
    """

    def __init__(
        self, weight: Tensor | Quantized, bias: Tensor, dtype: torch.dtype, *, gelu: bool
    ) -> None:
        quantized = self.convert(weight, dtype) if isinstance(weight, Tensor) else weight
        super().__init__(quantized, bias, dtype, gelu=gelu)
        sums = [rows.float().sum(1) for rows in torch.split(quantized.codes, _ROWS)]
        self._sums = torch.cat(sums) * self._scales  # (N,), of a row's weights

    def _product(self, codes: Tensor) -> Tensor:
        return F.linear(codes.round_(), self._codes.float()) * self._scales

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        low = x.amin(1, keepdim=True)  # (S, 1); `aminmax` takes ten times as long
        scale = (x.amax(1, keepdim=True) - low).div_(127).clamp_(min=_SMALLEST_PEAK)  # (S, 1)
        product = self._product((x - low).mul_(scale.reciprocal()))  # (S, N) float32
        torch.addcmul(self._bias, product, scale, out=product)
        product = product.addcmul_(low, self._sums).to(self._bias.dtype)
        return F.gelu(product) if self._gelu else product


class PackedInt7Linear(PlainInt7Linear, PackedInt8Linear):
    """The same by oneDNN's int8 product."""

    def _product(self, codes: Tensor) -> Tensor:
        weights = (self._codes, self._scales, self._zeros)
        unsigned = codes.round_().to(torch.uint8)
        linear: Any = torch.ops.onednn.qlinear_pointwise
        product: Tensor = linear(
            unsigned, 1.0, 0, *weights, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


class FbgemmInt7Linear(PlainInt7Linear):
    """The same by FBGEMM's product, which rounds and scales, too.

    oneDNN's takes two to four times as long for the few tokens of a query on a CPU without VNNI.
    PyTorch is to drop the type of its weights (https://github.com/pytorch/pytorch/issues/184982).
    """

    def _pack(self, codes: Tensor) -> None:
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # deprecated
        zeros = torch.zeros(len(codes), dtype=torch.int64)  # (N,)
        quantized = torch._make_per_channel_quantized_tensor  # noqa: SLF001
        weight = quantized(codes, self._scales.double(), zeros, 0)
        self._weight = torch.ops.quantized.linear_prepack(weight, None)

    def _product(self, codes: Tensor) -> Tensor:
        linear: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        product: Tensor = linear(codes, 1.0, 0, self._weight)
        return product


_PLAIN: dict[str, Any] = {"int8": PlainInt8Linear}

# What is fastest first; each beside the plain layer that it has to agree with.
_PACKED: dict[tuple[str, str], list[tuple[Any, Any]]] = {
    ("cpu", "float32"): [(PackedLinear, PlainLinear)],
    ("cpu", "bfloat16"): [(PackedLinear, PlainLinear)],
    ("cpu", "int8"): [
        (PackedInt8Linear, PlainInt8Linear),
        (FbgemmInt7Linear, PlainInt7Linear),
        (PackedInt7Linear, PlainInt7Linear),
    ],
}


@cache
def _packed(device: str, dtype: str, state_dtype: torch.dtype) -> Any:
    """Choose the fastest packed layer that is as exact as the plain one, or None."""
    reason = None
    for packed, plain in _PACKED.get((device, dtype), []):
        reason = _disagreement(packed, plain, state_dtype)
        if reason is None:
            return packed
    if reason is not None:
        logger.warning(
            "PyTorch %s has no usable oneDNN product for %s here (%s): its plain one is taken, "
            "slower.",
            torch.__version__,
            dtype,
            reason,
        )
    return None


def _disagreement(packed: Any, plain: Any, dtype: torch.dtype) -> str | None:
    """Describe how a packed layer disagrees with its plain one, if it does."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(shape, generator=generator) for shape in ((48, 64), (48,), (5, 64))
    )
    try:
        given = packed(weight, bias, dtype, gelu=True)(x)
    except (AttributeError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    wanted = plain(weight, bias, dtype, gelu=True)(x).float()
    difference = float((given.float() - wanted).abs().max() / wanted.abs().max())
    if difference <= tolerance(dtype):
        return None
    return f"a product differs by {difference:.1e} of its largest number"


def tolerance(dtype: torch.dtype) -> float:
    """Compute how far two correct products of 64 numbers may differ, as a part of the largest.

    Sums of float32 products differ by their order; a narrower dtype rounds the sum once.
    """
    return (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
