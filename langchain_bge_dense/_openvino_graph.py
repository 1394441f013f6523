"""The layers of a BERT-like encoder as an OpenVINO graph, built from their weights.

Linear layers run over the tokens of a batch without its padding; query, key and value are one
product. Knows no files, no tokenizer and no heads.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# All are BERT's layers under BERT's names.
MODEL_TYPES = ("bert", "camembert", "roberta", "xlm-roberta")

# Inputs of a linear layer that share a scale, in weights and in states (benchmarks/README.md).
INT8_GROUP = 128

# Of the graph below: a change makes what is stored of older ones stale.
FORMAT = 1

MASKED = -1e30  # added to the scores of padding


def is_installed() -> bool:
    """Whether OpenVINO can be imported, found without importing it."""
    return importlib.util.find_spec("openvino") is not None


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    Its import reports to Google Analytics; where that package cannot be imported it takes a stub.

    Raises:
        ImportError: It is not installed.
    """
    telemetry = "openvino_telemetry"
    hidden = telemetry not in sys.modules
    if hidden:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        msg = (
            f"The OpenVINO backend cannot be loaded ({error}). "
            'Run `pip install "langchain-bge-dense[openvino]"`, or use backend="torch".'
        )
        raise ImportError(msg) from error
    finally:
        if hidden:
            del sys.modules[telemetry]
    return openvino


def fits(config: Any) -> bool:
    """Whether the graph below computes what a transformers config describes."""
    return bool(
        config.model_type in MODEL_TYPES
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
    )


def build_graph(encoder: Any, dtype: str) -> Any:
    """Build the layers of a transformers encoder as an OpenVINO graph.

    Args:
        encoder: Of a type in `MODEL_TYPES`.
        dtype: What the linear layers multiply in: `"float32"`, `"bfloat16"` or `"int8"`.

    Returns:
        A graph of the inputs of `OpenVinoEncoder.forward` to the states `(S, D)`.
    """
    graph = _Graph(encoder.config, dtype)
    states = graph.inputs["states"]
    for layer in encoder.encoder.layer:
        states = graph.layer(layer, states)  # (S, D)
    return import_openvino().Model([states], list(graph.inputs.values()), "encoder")


class _Graph:
    """Shapes: S tokens of a batch of B texts, at most T each, D wide, H heads."""

    def __init__(self, config: Any, dtype: str) -> None:
        from openvino import opset13

        self._ops = opset13
        self._dtype = dtype
        self._type = "bf16" if dtype == "bfloat16" else "f32"
        self._heads = config.num_attention_heads
        self._width = config.hidden_size
        self._epsilon = config.layer_norm_eps
        self.inputs = {
            name: self._input(name, shape, kind)
            for name, shape, kind in (
                ("states", [-1, self._width], np.float32),
                ("tokens", [-1], np.int64),
                ("slots", [-1, -1], np.int64),
                ("bias", [-1, 1, 1, -1], np.float32),
            )
        }
        self._bias = self._narrow(self.inputs["bias"])  # (B, 1, 1, T)

    def _input(self, name: str, shape: list[int], kind: type) -> Any:
        parameter = self._ops.parameter(shape, kind, name)
        parameter.output(0).set_names({name})
        return parameter

    def layer(self, layer: Any, states: Any) -> Any:
        """One transformer layer, (S, D) to (S, D)."""
        ops = self._ops
        attended = self._attention(layer.attention.self, states)  # (S, D)
        output = layer.attention.output
        mixed = self._widen(self._linear(attended, output.dense))  # (S, D)
        states = self._normalise(ops.add(mixed, states), output.LayerNorm)
        inner = ops.gelu(self._linear(states, layer.intermediate.dense), "erf")  # (S, 4 D)
        output = layer.output
        mixed = self._widen(self._linear(inner, output.dense))  # (S, D)
        return self._normalise(ops.add(mixed, states), output.LayerNorm)

    def _attention(self, attention: Any, states: Any) -> Any:
        ops, heads, width = self._ops, self._heads, self._width
        size = width // heads
        packed = self._linear(states, attention.query, attention.key, attention.value)  # (S, 3 D)
        padded = ops.gather(packed, self.inputs["slots"], _ints(0))  # (B, T, 3 D)
        padded = ops.reshape(padded, _ints([0, 0, 3 * heads, size]), special_zero=True)
        parts = ops.variadic_split(padded, _ints(2), _ints([heads] * 3)).outputs()
        query, key, value = (ops.transpose(part, _ints([0, 2, 1, 3])) for part in parts)
        scores = ops.matmul(query, key, False, True)  # (B, H, T, T)
        scale = self._constant(torch.tensor(size**-0.5).reshape(1, 1, 1, 1))
        weights = ops.softmax(ops.add(ops.multiply(scores, scale), self._bias), -1)
        mixed = ops.transpose(ops.matmul(weights, value, False, False), _ints([0, 2, 1, 3]))
        mixed = ops.reshape(mixed, _ints([-1, width]), special_zero=False)  # (B * T, D)
        return ops.gather(mixed, self.inputs["tokens"], _ints(0))  # (S, D)

    def _normalise(self, states: Any, norm: nn.LayerNorm) -> Any:
        ops = self._ops
        states = ops.mvn(states, _ints([-1]), True, self._epsilon, "inside_sqrt")
        weight, bias = (
            ops.constant(part.detach().numpy()[None]) for part in (norm.weight, norm.bias)
        )
        return ops.add(ops.multiply(states, weight), bias)

    def _linear(self, states: Any, *parts: nn.Linear) -> Any:
        """Several linear layers of the same input as one."""
        weight = torch.cat([part.weight.detach() for part in parts])  # (N, K)
        bias = torch.cat([part.bias.detach() for part in parts])[None]  # (1, N)
        matrix = self._quantised(weight) if self._dtype == "int8" else self._constant(weight)
        product = self._ops.matmul(self._narrow(states), matrix, False, True)  # (S, N)
        return self._ops.add(product, self._constant(bias))

    def _quantised(self, weight: Tensor) -> Any:
        """Symmetric int8 weights with one scale for each row and group of inputs."""
        ops, (rows, columns) = self._ops, weight.shape
        size = INT8_GROUP if columns % INT8_GROUP == 0 else columns
        groups = weight.reshape(rows, columns // size, size)
        scale = groups.abs().amax(2, keepdim=True).div_(127).clamp_(min=1e-30)
        codes = (groups / scale).round_().to(torch.int8)
        wide = ops.multiply(
            ops.convert(ops.constant(codes.numpy()), "f32"), ops.constant(scale.numpy())
        )
        return ops.reshape(wide, _ints([rows, columns]), special_zero=False)

    def _constant(self, tensor: Tensor) -> Any:
        if self._type == "f32":
            return self._ops.constant(tensor.numpy(), shared_memory=True)
        # NumPy has no bfloat16, and OpenVINO's own rounding cuts the bits off.
        ov, bits = import_openvino(), tensor.to(torch.bfloat16).view(torch.int16)
        owned = ov.Tensor(ov.Type.bf16, ov.Shape(list(bits.shape)))
        owned.data.view(np.int16)[:] = bits.numpy()
        return self._ops.constant(owned)

    def _narrow(self, node: Any) -> Any:
        return node if self._type == "f32" else self._ops.convert(node, self._type)

    def _widen(self, node: Any) -> Any:
        return node if self._type == "f32" else self._ops.convert(node, "f32")


def _ints(value: int | list[int]) -> Any:
    from openvino import opset13

    return opset13.constant(np.array(value, dtype=np.int64))


def compile_graph(model: Any, dtype: str) -> Any:
    """Compile a graph for this CPU, on as many threads as PyTorch uses."""
    core = import_openvino().Core()
    bf16 = dtype != "float32" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP if dtype == "int8" else 0,
    }
    return core.compile_model(model, "CPU", options)
