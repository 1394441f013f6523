"""Each row of docs/checkpoints.md, held against sentence-transformers."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from reference import flag_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tiny_families import FAMILIES, build_family, change_json, write_json, write_modules
from tiny_m3 import TEXT, build
from transformers import AutoModel, BartConfig, BartModel

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
TEXTS = [
    "Free and Equal in dignity",
    "a",
    "",
    "什么是稠密向量? 它和稀疏权重有什么不同",
    "A query: " + "free and equal rights " * 150,
]
WEIGHTS = "model.safetensors"
# The lowest transformers lacks the newest families.
KNOWN = [family for family, (kind, _) in FAMILIES.items() if hasattr(transformers, kind)]


def load(folder: Path, **settings: Any) -> BGEM3Embeddings:
    fixed = {"device": "cpu", "dtype": "float32", "max_length": 512, "on_truncate": "ignore"}
    return BGEM3Embeddings(model=folder, **fixed | settings)


def unit(vectors: Any) -> NDArray[np.float32]:
    vectors = np.array(vectors)  # (N, D)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reference(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def assert_same(found: Any, expected: Any) -> None:
    found, expected = np.array(found), unit(expected)
    assert found.shape == expected.shape
    assert (found * expected).sum(1).min() > 0.999999
    assert np.abs(np.triu(expected @ expected.T, 1)).max() < 0.99  # texts that are told apart


def assert_loads(folder: Path, texts: list[str] = TEXTS) -> None:
    theirs = reference(folder)
    # Text by text: in some families the padding of others changes the last digits.
    assert_same(load(folder).embed_documents(texts), [theirs.encode_document(t) for t in texts])
    assert_same(
        [load(folder).embed_query(t) for t in texts], [theirs.encode_query(t) for t in texts]
    )


def rows(title: str) -> list[list[str]]:
    """Cells of the table under a title."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_family_is_in_the_table() -> None:
    listed = [name for cell, _ in rows("Families") for name in re.findall(r"`(.+?)`", cell)]
    assert sorted(listed) == sorted(FAMILIES)


@pytest.mark.parametrize("family", KNOWN)
def test_a_family_gives_sentence_transformers_vectors(family: str, tmp_path: Path) -> None:
    folder = build_family(tmp_path / family, family)
    assert_loads(folder)
    [exact, half] = (
        np.array(load(folder, dtype=dtype).embed_documents(TEXTS))
        for dtype in ("float32", "bfloat16")
    )
    assert (exact * half).sum(1).min() > 0.999


@pytest.mark.parametrize("family", ["eurobert", "modernbert"])
def test_rotary_positions_are_those_of_transformers_in_bfloat16(
    family: str, tmp_path: Path
) -> None:
    """Their frequencies stay in float32: rounded, they turn far tokens by half a radian."""
    folder = build_family(tmp_path / "long", family, pooling="cls", max_position_embeddings=8_192)
    text = " ".join(random.Random(0).choices(TEXT.split(), k=2_000))
    half = load(folder, dtype="bfloat16", max_length=None, on_truncate="raise")
    assert half.count_tokens(text) > 4_000
    inputs = reference(folder).tokenizer(text, return_tensors="pt", truncation=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    right = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    rounded = AutoModel.from_pretrained(folder).to(torch.bfloat16)
    with torch.inference_mode():
        expected, wrong = (
            unit(model(**inputs).last_hidden_state[:, 0].float().numpy())[0]
            for model in (right, rounded)
        )
    assert expected @ wrong < 0.999
    assert expected @ half.embed_query(text) > 0.9999


CASES: dict[str, Callable[[Path], Any]] = {}


def row(name: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """The test of a row."""

    def add(test: Callable[[Path], Any]) -> Callable[[Path], Any]:
        assert name not in CASES
        CASES[name] = test
        return test

    return add


def test_every_row_is_tested() -> None:
    assert [cell for cell, _ in rows("Layouts and settings")] == list(CASES)


@pytest.mark.parametrize(
    "name", [re.sub(r"[^\w ]", "", cell) for cell, _ in rows("Layouts and settings")]
)
def test_a_row(name: str, tmp_path: Path) -> None:
    [test] = [case for cell, case in CASES.items() if re.sub(r"[^\w ]", "", cell) == name]
    test(tmp_path)


def refuses(folder: Path, words: str, **settings: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load(folder, **settings).load()
    assert "ownload" not in str(caught.value)


def write_dense(folder: Path, inputs: int, outputs: int, **settings: Any) -> None:
    torch.manual_seed(outputs)
    modules.Dense(inputs, outputs, **settings).save(str(folder), safe_serialization=outputs != 48)


@row("`Dense` modules, with their activation")
def dense(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "dense", "bert")
    kinds = (
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
        "Dropout",
        "Dense",
        "Dense",
        "Normalize",
    )
    write_modules(folder, kinds)
    for name in ("2_Dense", "3_Normalize", "4_Dropout", "5_Dense", "6_Dense", "7_Normalize"):
        (folder / name).mkdir()
    write_json(folder / "4_Dropout" / "config.json", {"dropout": 0.2})
    write_dense(folder / "2_Dense", 32, 48)
    write_dense(folder / "5_Dense", 48, 48, activation_function=torch.nn.GELU(), use_residual=True)
    write_dense(folder / "6_Dense", 48, 24, bias=False, activation_function=None, use_residual=True)
    assert_loads(folder)
    assert load(folder).dimension == 24
    before = load(folder).fingerprint
    for path, words in (("2_Dense/pytorch_model.bin", "damaged"), ("6_Dense/config.json", "24")):
        kept = (folder / path).read_bytes()
        if path.endswith("json"):
            change_json(folder / path, out_features=25)
        else:
            (folder / path).write_bytes(kept[:-100])
        with pytest.raises(ValueError, match=re.escape(str((folder / path).parent)) + f".*{words}"):
            load(folder).load()
        (folder / path).write_bytes(kept)
    write_dense(folder / "5_Dense", 48, 48, activation_function=torch.nn.Tanh(), use_residual=True)
    assert load(folder).fingerprint != before
    change_json(folder / "2_Dense" / "config.json", activation_function="os.system")
    refuses(folder, r"2_Dense.config\.json asks for os\.system")


@row("another module in `modules.json`")
def other_modules(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "other", "bert")
    for kinds, name in (
        (("Transformer", "Pooling", "LayerNorm"), "'LayerNorm' as module 2"),
        (("Transformer", "LSTM", "Pooling"), "'LSTM' as module 1"),
        (("Transformer", "Dense", "Pooling"), "'Dense' as module 1"),
        (("StaticEmbedding",), "'StaticEmbedding' as module 0"),
        (("custom_st.Transformer", "Pooling"), r"'custom_st\.Transformer' as module 0"),
    ):
        write_modules(folder, kinds)
        for settings in ({}, {"pooling": "mean"}):
            refuses(folder, rf"modules\.json lists {name}", **settings)
    outside = [{"type": "x", "path": path} for path in ("../x", "/x", "x/y", "..")]
    for content in ([], *([entry] for entry in outside), [7], [{"path": ""}], [{"type": 7}]):
        write_json(folder / "modules.json", content)
        with pytest.raises(ValueError, match=r"modules\.json is damaged"):
            load(folder).load()


@row("`1_Pooling` with `cls` or `mean`")
def pooling(tmp_path: Path) -> None:
    for mode, content in (
        ("cls", {"pooling_mode": "cls"}),
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("mean", {"pooling_mode": ["mean"]}),
        ("mean", {"pooling_mode_cls_token": False}),
        ("mean", {}),
    ):
        folder = build_family(tmp_path / f"{mode}{len(str(content))}", "bert")
        file = folder / "1_Pooling" / "config.json"
        write_json(file, {"word_embedding_dimension": 32} | content)
        assert_loads(folder)
        assert f"-{mode}" in load(folder).fingerprint


@row("`1_Pooling` with another mode, or several")
def other_pooling(tmp_path: Path) -> None:
    for mode in ("lasttoken", "weightedmean", "max", ["cls", "mean"], "mean_sqrt_len_tokens"):
        folder = build_family(tmp_path / f"{mode}", "bert", pooling=mode)
        words = mode if isinstance(mode, str) else r"cls\+mean"
        refuses(folder, rf"1_Pooling.config\.json asks for {words} pooling, and only cls and mean")
        assert load(folder, pooling="cls").embed_query("free")


@row("`modules.json` names a pooling that is missing")
def missing_pooling(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "missing", "bert")
    expected = load(folder).embed_documents(TEXTS)
    (folder / "1_Pooling" / "config.json").unlink()
    refuses(folder, r"1_Pooling.config\.json is missing, which says how to pool")
    assert load(folder, pooling="mean").embed_documents(TEXTS) == expected
    write_modules(folder, ["Transformer"])
    refuses(folder, "lists no Pooling")


@row("no `modules.json`")
def no_modules(tmp_path: Path) -> None:
    folder = build(tmp_path / "flag")
    (folder / "modules.json").unlink()
    shutil.rmtree(folder / "1_Pooling")
    flag = flag_model(folder)
    assert_same(load(folder).embed_documents(TEXTS), flag.encode(TEXTS)["dense_vecs"])


def in_a_part(tmp_path: Path) -> Path:
    whole = build_family(tmp_path / "whole", "distilbert")
    part = whole / "0_Transformer"
    part.mkdir()
    for file in [f for f in whole.iterdir() if f.is_file() and f.name != "modules.json"]:
        file.rename(part / file.name)
    write_modules(whole, ("Transformer", "Pooling"), transformer="0_Transformer")
    write_json(
        part / "sentence_distilbert_config.json", {"max_seq_length": 128, "do_lower_case": True}
    )
    return whole


@row("the transformer in `0_Transformer`")
def old_layout(tmp_path: Path) -> None:
    assert_loads(in_a_part(tmp_path), [text[:100] for text in TEXTS])


@row("`0_Transformer` itself")
def part_of_the_old_layout(tmp_path: Path) -> None:
    whole = in_a_part(tmp_path)
    part = whole / "0_Transformer"
    refuses(part, re.escape(f"is the transformer alone of the model in {whole}"))
    found = load(part, pooling="mean").embed_documents(TEXTS)
    assert found == load(whole).embed_documents(TEXTS)


PROMPTS = "config_sentence_transformers.json"


@row("`prompts` for queries and documents")
def prompts(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "prompts", "bert")
    plain = load(folder)
    before = plain.embed_query("free")
    write_json(folder / PROMPTS, {"prompts": {"query": "find: ", "document": "text: "}})
    assert_loads(folder)
    assert load(folder, query_instruction="").embed_query("free") == before
    assert load(folder).fingerprint != plain.fingerprint


@row("`default_prompt_name`")
def default_prompt(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "default", "bert")
    content = {"prompts": {"other": "find: "}, "default_prompt_name": "other"}
    write_json(folder / PROMPTS, content)
    expected = [reference(folder).encode(text) for text in TEXTS]
    assert_same(load(folder).embed_documents(TEXTS), expected)
    assert_same([load(folder).embed_query(text) for text in TEXTS], expected)


@row("`include_prompt: false`")
def excluded_prompt(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "excluded", "bert")
    change_json(folder / "1_Pooling" / "config.json", include_prompt=False)
    assert_loads(folder)
    write_json(folder / PROMPTS, {"prompts": {"query": "find: "}})
    assert load(folder).embed_documents(["free"])
    with pytest.raises(ValueError, match=r"pools without the tokens of its prompt"):
        load(folder).embed_query("free")


@row("`do_lower_case`")
def lower_case(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "lower", "bert")
    before = load(folder).fingerprint
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": True})
    assert_loads(folder)
    assert load(folder).embed_query("FREE") == load(folder).embed_query("free")
    assert load(folder).count_tokens("FREE") == load(folder).count_tokens("free")
    assert load(folder).fingerprint != before
    with pytest.raises(ValueError, match="BGEM3FlagModel ignores"):
        BGEM3Embeddings.from_flag_model(flag_model(folder, pooling_method="mean"))


@row("`max_seq_length`")
def longest(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "longest", "bert")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16})
    expected = [reference(folder).encode(text) for text in TEXTS]
    assert_same(load(folder, max_length=16).embed_documents(TEXTS), expected)
    with pytest.warns(UserWarning, match="longer than max_length=16"):
        load(folder, max_length=16, on_truncate="warn").embed_documents(TEXTS[-1:])
    assert not load(folder).encode(TEXTS[:1], dense=True).truncated.any()


@row("`transformer_task`, `model_args` and the like")
def settings_of_the_transformer(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "settings", "bert")
    usual = {"method": "forward", "method_output_name": "last_hidden_state"}
    file = folder / "sentence_bert_config.json"
    write_json(
        file,
        {"transformer_task": "feature-extraction", "modality_config": {"text": usual}}
        | {"module_output_name": "token_embeddings", "processing_kwargs": {}, "model_args": {}},
    )
    assert_loads(folder)
    for name, value in {
        "transformer_task": "fill-mask",
        "modality_config": {"text": usual | {"method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
        "model_args": {"attn_implementation": "eager"},
        "tokenizer_args": {"padding_side": "left"},
        "query_expansion": {"token": "[MASK]"},
    }.items():
        write_json(file, {name: value})
        refuses(folder, rf"sentence_bert_config\.json sets {name}=")


@row('`truncation_side: "left"`')
def truncation_side(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "left", "bert")
    right = load(folder).embed_documents(TEXTS)
    change_json(folder / "tokenizer_config.json", truncation_side="left")
    assert_loads(folder)
    left = load(folder).embed_documents(TEXTS)
    assert (left[:-1], left[-1] == right[-1]) == (right[:-1], False)


@row("weights in shards")
def shards(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "shards", "nomic_bert")
    (folder / WEIGHTS).unlink()
    model = AutoModel.from_config(
        AutoModel.from_pretrained(build_family(tmp_path / "one", "nomic_bert")).config
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_loads(folder)


@row("`.bin` files from before PyTorch 1.6")
def old_pickles(tmp_path: Path) -> None:
    folder = build(tmp_path / "old")
    expected = load(folder).encode(TEXTS, lexical=True)
    old = {"_use_new_zipfile_serialization": False}
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin", **old)
    (folder / WEIGHTS).unlink()
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        torch.save(torch.load(folder / name), folder / name, **old)
    found = load(folder).encode(TEXTS, lexical=True)
    assert np.array_equal(found.dense, expected.dense)
    assert found.lexical == expected.lexical
    assert_loads(folder)


@row("ColBERT head of another width")
def narrow_colbert(tmp_path: Path) -> None:
    folder = build(tmp_path / "narrow")
    head = {"weight": torch.randn(8, 32), "bias": torch.randn(8)}
    torch.save(head, folder / "colbert_linear.pt")
    flag = flag_model(folder, colbert_dim=8)
    expected = flag.encode(TEXTS[:4], return_colbert_vecs=True)["colbert_vecs"]
    found = load(folder).encode(TEXTS[:4], colbert=True).colbert
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@row("tensors of LoRA beside the weights")
def lora(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "lora", "bert")
    weights = load_file(folder / WEIGHTS)
    names = ("lora_A.default.weight", "lora_B.default.weight")
    added = {f"encoder.layer.0.attention.self.query.{name}": torch.zeros(2, 2) for name in names}
    save_file(weights | added, folder / WEIGHTS, {"format": "pt"})
    refuses(folder, r"hold an adapter beside the model \(.*lora_A.*Merge it")
    surplus = {"encoder.layer.0.attention.self.query.scale": torch.zeros(2)}
    save_file(weights | surplus, folder / WEIGHTS, {"format": "pt"})
    refuses(folder, "config.json has no layer for its tensor .*query.scale")


@row("`auto_map` names code for `AutoModel` or the tokenizer")
def own_code(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "code", "qwen2")
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Qwen2Model"}
    change_json(folder / "config.json", auto_map=code)
    refuses(folder, r"config\.json refers to custom code \(evil\.Qwen2Model\)")
    change_json(folder / "config.json", auto_map=code, model_type="new")
    refuses(folder, r"config\.json refers to custom code \(evil\.Qwen2Model\)")
    change_json(folder / "config.json", auto_map={}, model_type="new")
    refuses(folder, r"config\.json describes no model .* `new`")


@row("a reranker or classifier")
def reranker(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "reranker", "xlm-roberta")
    change_json(folder / "config.json", architectures=["XLMRobertaForSequenceClassification"])
    refuses(folder, r"of a reranker .*\(.*XLMRobertaForSequenceClassification.*\)")
    change_json(folder / "config.json", architectures=None)
    weights = load_file(folder / WEIGHTS) | {"classifier.out_proj.weight": torch.zeros(1, 32)}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    refuses(folder, r"of a reranker .*classifier\.out_proj")


@row("an encoder-decoder other than T5")
def decoder(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "bart", "bert")
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers",)}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    BartModel(BartConfig(vocab_size=600, d_model=32, **sizes)).save_pretrained(folder)
    refuses(folder, "describes bart, an encoder-decoder")


@row("a tokenizer written in Python alone")
def slow_tokenizer(tmp_path: Path) -> None:
    folder = build_family(tmp_path / "slow", "bert")
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    change_json(
        folder / "tokenizer_config.json",
        word_tokenizer_type="basic",
        subword_tokenizer_type="character",
    )
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(piece for piece, _ in vocab))
    (folder / "tokenizer.json").unlink()
    refuses(folder, "BertJapaneseTokenizer, written in Python alone")
