"""Peers of the benchmarks that need models of their own: ONNX Runtime and llama.cpp.

    onnx/bin/python benchmarks/peers.py onnx --model /tmp/bge-m3-random --folder /tmp/peers
    llama/bin/python benchmarks/peers.py gguf --model /tmp/bge-m3-random --folder /tmp/peers

Each command runs in the environment of its peer and writes that peer's models. All of them get the
ids of the checkpoint's own tokenizer, so that what is compared is the same work.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Embed = Callable[[list[str]], NDArray[np.float32]]

T = TypeVar("T")
# Neighbours in length, at most so many and with so much padding: what batches of 32 come to in a
# corpus of thousands of texts. In the few of a benchmark they would be padding for the most part.
BATCH, PADDING = 32, 0.1
THREADS = os.cpu_count() or 1
CONTEXT = 8_192
FORMATS = ("F16", "Q8_0")


def write_onnx(model: str, folder: Path) -> None:
    """Export the encoder in float32, and quantise it to 8 bits, tokens dynamically."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()

    class Cls(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return torch.nn.functional.normalize(states[:, 0], dim=-1)  # (B, D)

    files = [folder / f"onnx-{dtype}" / "model.onnx" for dtype in ("float32", "int8")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.full((2, 8), 5)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = encoder.config.pad_token_id, 0  # else the mask is left out
    sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    shapes = {"ids": sizes, "mask": sizes}
    program = torch.onnx.export(Cls(), (ids, mask), dynamo=True, dynamic_shapes=shapes)
    assert program is not None
    program.save(files[0], external_data=True)
    quantize_dynamic(
        *files,
        per_channel=True,
        reduce_range=not torch.cpu._is_vnni_supported(),  # noqa: SLF001 - AVX2 adds in 16 bits
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def onnx_runtime(model: str, file: Path) -> Embed:
    """An ONNX Runtime session over batches of texts of similar length."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(file, options)
    tokenize = tokenizer_of(model)

    def run(texts: list[list[int]]) -> NDArray[np.float32]:
        lengths = np.array([len(ids) for ids in texts])  # (B,)
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        ids = np.ones(mask.shape, np.int64)  # (B, T)
        ids[mask] = np.concatenate(texts)
        [found] = session.run(None, {"ids": ids, "mask": mask.astype(np.int64)})
        return np.asarray(found, np.float32)  # (B, D)

    def embed(texts: list[str]) -> NDArray[np.float32]:
        ids = [tokenize(text) for text in texts]
        return in_batches(ids, [len(text) for text in ids], run)

    return embed


def write_gguf(model: str, folder: Path) -> None:
    """Write the weights under llama.cpp's names, matrices in float16 and in blocks of 8 bits.

    Names: `MODEL_ARCH.BERT` of https://github.com/ggml-org/llama.cpp/blob/master/gguf-py.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, PoolingType, quants
    from safetensors.numpy import load_file

    config = json.loads((Path(model) / "config.json").read_text())
    weights = load_file(Path(model) / "model.safetensors")
    for name in FORMATS:
        kind = GGMLQuantizationType[name]
        writer = GGUFWriter(folder / f"{name}.gguf", "bert")
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_causal_attention(False)
        writer.add_pooling_type(PoolingType.CLS)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_token_type_count(1)
        writer.add_tokenizer_model("none")  # it gets ids
        for key, weight in weights.items():
            target = gguf_name(key)
            if target is None:
                continue
            if weight.ndim == 2 and target not in EXACT:
                writer.add_tensor(target, quants.quantize(weight, kind), raw_dtype=kind)
            else:  # positions begin behind the padding's
                first = config["pad_token_id"] + 1 if target == "position_embd.weight" else 0
                writer.add_tensor(target, weight[first:])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


EXACT = ("position_embd.weight", "token_types.weight")
GGUF_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def gguf_name(key: str) -> str | None:
    """The name of a tensor of transformers in llama.cpp; None for a pooler's."""
    stem, _, part = key.rpartition(".")
    if stem.startswith("encoder.layer."):
        _, _, layer, name = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[name]}.{part}"
    return f"{GGUF_NAMES[stem]}.{part}" if stem in GGUF_NAMES else None


def llama_cpp(model: str, file: Path) -> Embed:
    """llama.cpp in this process; a batch of it has no padding, but one mask over all its tokens."""
    from llama_cpp import LLAMA_POOLING_TYPE_CLS, Llama

    llama = Llama(
        str(file),
        embedding=True,
        pooling_type=LLAMA_POOLING_TYPE_CLS,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_ubatch=CONTEXT,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        flash_attn=True,
        verbose=False,
    )
    tokenize = tokenizer_of(model)

    def run(texts: list[str]) -> NDArray[np.float32]:
        return np.array(llama.embed(texts, normalize=True), np.float32)  # (B, D)

    def embed(texts: list[str]) -> NDArray[np.float32]:
        ids = {text: tokenize(text) for text in texts}
        llama.tokenize = lambda text, *_, **__: ids[text.decode()]
        return in_batches(texts, [len(ids[text]) for text in texts], run)

    return embed


def tokenizer_of(model: str) -> Callable[[str], list[int]]:
    """The checkpoint's own tokenizer, up to its longest text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(CONTEXT)
    return lambda text: list(tokenizer.encode(text).ids)


def in_batches(
    texts: list[T], lengths: list[int], run: Callable[[list[T]], Any]
) -> NDArray[np.float32]:
    """Run batches of neighbours in length; gives `(N, D)` in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda n: lengths[n])
    found = [np.asarray(run([texts[n] for n in batch])) for batch in batches(order, lengths)]
    result = np.empty((len(texts), found[0].shape[1]), np.float32)
    result[order] = np.concatenate(found)
    return result


def with_little_padding(model: str, run: Callable[[list[str]], Any]) -> Embed:
    """Give texts in such batches to a library that would pad its own."""
    tokenize = tokenizer_of(model)

    def embed(texts: list[str]) -> NDArray[np.float32]:
        return in_batches(texts, [len(tokenize(text)) for text in texts], run)

    return embed


def batches(order: list[int], lengths: list[int]) -> list[list[int]]:
    """Cut an order from short to long where a batch would get too large or too much padding."""
    found: list[list[int]] = [[]]
    for n in order:
        batch = [*found[-1], n]
        tokens = sum(lengths[m] for m in batch)
        if len(batch) > BATCH or len(batch) * lengths[n] > (1 + PADDING) * tokens:
            found.append([n])
        else:
            found[-1] = batch
    return found


COMMANDS = {"onnx": write_onnx, "gguf": write_gguf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", required=True, help="a folder with model.safetensors")
    parser.add_argument("--folder", type=Path, required=True, help="where the models go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    COMMANDS[arguments.command](arguments.model, arguments.folder)


if __name__ == "__main__":
    main()
