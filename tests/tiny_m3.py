"""Build a checkpoint of BGE-M3's layout with random weights, as small or as large as wanted.

XLM-RoBERTa, a Unigram tokenizer trained on the text below, both extra heads, in the files that the
real checkpoint has. It has no meaning and knows nothing of `langchain_bge_dense`.
"""

# ruff: noqa: RUF001
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import XLMRobertaConfig, XLMRobertaModel

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3; <mask> comes last of all
TOKENIZER_SIZE = 800

TEXT = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and \
conscience and should act towards one another in a spirit of brotherhood.
Everyone has the right to life, liberty and security of person. No one shall be held in slavery.
An embedding turns a passage of text into a dense vector of numbers, so that passages with a \
similar meaning lie close together. A query is embedded in the same way, and the nearest passages \
are the answer. Lexical weights say how much each token of the passage matters.
The quick brown fox jumps over the lazy dog; 0 1 2 3 4 5 6 7 8 9, 1,024 and 8,192 (100%)!
人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。
人人有权享有生命、自由和人身安全。任何人不得使为奴隶或奴役。
向量检索把文本变成稠密向量,意思相近的文本在空间里也相近。查询和文档使用同一个模型。
什么是稠密向量?它和稀疏权重有什么不同?今天天气很好,我们去公园散步。
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم \
بعضا بروح الإخاء. لكل فرد الحق في الحياة والحرية وسلامة شخصه. البحث الدلالي يجد النصوص القريبة \
في المعنى.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und \
Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison \
et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.
Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de \
razón y conciencia, deben comportarse fraternalmente los unos con los otros.
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и \
совестью и должны поступать в отношении друг друга в духе братства.
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ
😀 🎉 👍 🚀 ❤ ✓ → € ° « » “ ” — …
"""


def build(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    intermediate: int = 64,
    positions: int = 514,
    vocab: int | None = None,
    with_heads: bool = True,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint of BGE-M3's layout; equal arguments give equal vectors.

    The global random state is neither read nor changed.

    Args:
        folder: Where to write; made when missing.
        layers: Transformer layers.
        hidden: Width of the token states and of the dense vectors.
        heads: Attention heads; must divide `hidden`.
        intermediate: Width of the feed-forward layers.
        positions: Position embeddings. Two are not for tokens, so 514 take texts of 512 tokens.
        vocab: Rows of the word embedding; None: as many as the tokenizer has tokens.
        with_heads: False leaves out `sparse_linear.pt` and `colbert_linear.pt`.
        seed: Decides every weight.

    Returns:
        `folder`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> folder = build(Path(mkdtemp()))
        >>> (folder / "model.safetensors").exists()
        True
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    config = XLMRobertaConfig(
        architectures=["XLMRobertaModel"],
        vocab_size=vocab or tokenizer.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=positions,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        dtype="float32",
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, max_length=positions - 2)
    write_pooling(folder, hidden)
    generator = torch.Generator().manual_seed(seed)
    save_file(random_weights(config, generator), folder / "model.safetensors", {"format": "pt"})
    if with_heads:
        write_heads(folder, hidden, generator)
    return folder


def train_tokenizer() -> Tokenizer:
    """Train XLM-RoBERTa's kind of tokenizer, with its ids of special tokens, on `TEXT`."""
    trained = _train_sentencepiece()
    pieces = [(piece.piece, piece.score) for piece in trained.pieces]
    unknown = SPECIAL_TOKENS.index("<unk>")
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=unknown))
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, AddedToken("<mask>", lstrip=True)])
    tokenizer.normalizer = normalizers.Precompiled(trained.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def _train_sentencepiece() -> ModelProto:
    # The trainer of `tokenizers` gives other scores at each run; this one, on one thread, does not.
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        vocab_size=TOKENIZER_SIZE,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
    )
    return ModelProto.FromString(model.getvalue())


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write the tokenizer and the two files that name its special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    _write_json(folder / "special_tokens_map.json", names)
    config = names | {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": max_length}
    _write_json(folder / "tokenizer_config.json", config)


def write_pooling(folder: Path, hidden: int) -> None:
    """Write the files by which sentence-transformers pools the cls token, as BGE-M3 has them."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    _write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    # As BGE-M3's has them: nothing goes in front of a text.
    _write_json(
        folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None}
    )
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_cls_token": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def random_weights(config: XLMRobertaConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw every weight of the encoder, in the order of its parameters."""
    with torch.device("meta"):
        parameters = list(XLMRobertaModel(config).named_parameters())
    return {name: _draw(name, meta.shape, generator) for name, meta in parameters}


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    # Spread wide enough that attention prefers some tokens and texts end far from one another;
    # at the usual 0.02 the vectors of all texts are nearly the same.
    tensor = torch.empty(shape).normal_(generator=generator)
    if "LayerNorm.weight" in name:
        return tensor.mul_(0.1).add_(1)
    if len(shape) == 1:
        return tensor.mul_(0.1)
    if "embeddings" in name:
        return tensor.mul_(1.0 if "word" in name else 0.3)
    return tensor.mul_(1.5 / math.sqrt(shape[1]))


def write_heads(folder: Path, hidden: int, generator: torch.Generator) -> None:
    """Write both heads; lexical weights are of BGE-M3's order, positive for most tokens."""
    scale = 1 / math.sqrt(hidden)
    colbert, sparse = (
        torch.empty(rows, hidden).normal_(std=scale, generator=generator) for rows in (hidden, 1)
    )
    bias = torch.empty(hidden).normal_(std=0.1, generator=generator)
    torch.save({"weight": colbert, "bias": bias}, folder / "colbert_linear.pt")
    head = {"weight": sparse * 0.2, "bias": torch.full((1,), 0.15)}
    torch.save(head, folder / "sparse_linear.pt")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
