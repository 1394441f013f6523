"""Build checkpoints of many families in sentence-transformers' layout, with random weights.

They have the tokenizer of `tiny_m3`, and know nothing of `langchain_bge_dense`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tiny_m3 import train_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
}
_ROTARY = _SIZES | {"num_key_value_heads": 4, "head_dim": 8}
_T5 = {"vocab_size": 600, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_T5 |= {"pad_token_id": 1, "decoder_start_token_id": 1}

# Class of the configuration, and its sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZES),
    "roberta": ("RobertaConfig", _SIZES),
    "xlm-roberta": ("XLMRobertaConfig", _SIZES),
    "camembert": ("CamembertConfig", _SIZES),
    "mpnet": ("MPNetConfig", _SIZES),
    "electra": ("ElectraConfig", _SIZES | {"embedding_size": 32}),
    "albert": ("AlbertConfig", _SIZES | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", _SIZES),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 600, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        | {"pad_token_id": 1},
    ),
    "t5": ("T5Config", _T5),
    "mt5": ("MT5Config", _T5),
    "umt5": ("UMT5Config", _T5),
    "modernbert": ("ModernBertConfig", _SIZES | {"global_attn_every_n_layers": 2}),
    "eurobert": ("EuroBertConfig", _ROTARY),
    "gemma3_text": ("Gemma3TextConfig", _ROTARY | {"use_bidirectional_attention": True}),
    "qwen2": ("Qwen2Config", _ROTARY),
    "qwen3": ("Qwen3Config", _ROTARY),
    "nomic_bert": ("NomicBertConfig", _SIZES),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Config", _SIZES),
    "gte": ("GteConfig", _SIZES),
}


def build_family(
    folder: Path, family: str, *, pooling: str = "mean", seed: int = 0, **settings: Any
) -> Path:
    """Write a checkpoint of a family.

    Args:
        folder: Where to write; made when missing.
        family: A key of `FAMILIES`.
        pooling: A mode of sentence-transformers' Pooling.
        seed: Decides every weight.
        **settings: Of the configuration.

    Returns:
        `folder`.
    """
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, kind)(**sizes | settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 1 if "embed" in name else 1.5 / math.sqrt(weight.shape[-1])
                torch.nn.init.normal_(weight, std=scale)
    if config.is_encoder_decoder:
        model = getattr(transformers, type(model).__name__.replace("Model", "EncoderModel"))(config)
    model.save_pretrained(folder)
    write_tokenizer(folder, train_tokenizer(), max_length=512)
    if family not in {"xlm-roberta", "camembert"}:
        change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    write_modules(folder, ("Transformer", "Pooling"))
    write_json(
        folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": pooling}
    )
    return folder


def write_modules(folder: Path, kinds: Sequence[str], transformer: str = "") -> None:
    """Write `modules.json`; kinds are names of sentence-transformers' classes, or full ones."""
    write_json(
        folder / "modules.json",
        [
            {
                "idx": place,
                "name": str(place),
                "path": f"{place}_{kind.rpartition('.')[2]}" if place else transformer,
                "type": kind if "." in kind else f"sentence_transformers.models.{kind}",
            }
            for place, kind in enumerate(kinds)
        ],
    )


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def change_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, content | values)
