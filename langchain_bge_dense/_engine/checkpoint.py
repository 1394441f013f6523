"""The facts in the files of a checkpoint, and whether these belong together.

transformers fills missing tensors with random numbers and drops surplus ones, with a remark in a
log. So it is asked first, without any data, what it would make of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_bge_dense._engine.files import (
    check_container,
    digest_of,
    first_line,
    read_json,
    shapes,
    weight_files,
)
from langchain_bge_dense._engine.modules import Dense, Modules, read_modules, transformer_folder
from langchain_bge_dense.errors import BrokenCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HEADS = ("colbert_linear.pt", "sparse_linear.pt")
TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SMALL_FILES = ("config.json", *TOKENIZER_SETTINGS, *TOKENIZERS, *HEADS)

# Settings that make transformers load, even download, other files than those verified here.
_REDIRECTING_SETTINGS = (
    "transformers_weights",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
)
# What families call these numbers.
_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
_POSITIONS = ("max_position_embeddings", "n_positions")
# Families that count positions from pad_token_id + 1.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text")
ENCODERS_OF_PAIRS = ("t5", "mt5", "umt5")  # whose encoder is run without the decoder

_UNUSED = ("pooler.", "decoder.")  # BGE-M3 pools by itself
_CLASSIFIERS = ("classifier.", "score.")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and what its files say.

    Attributes:
        folder: Where the transformer's files are.
        name: The last part of the hub id or of the folder, for people to read.
        digest: Twelve hex digits over every file that changes the vectors.
        has_heads: Whether it has lexical weights and ColBERT vectors.
        dimension: Width of a dense vector.
        positions: Longest input in tokens.
        modules: What is done beside running the transformer.
    """

    folder: Path
    name: str
    digest: str
    has_heads: bool
    dimension: int
    positions: int
    modules: Modules

    def longest(self, max_length: int | None) -> int:
        """Check a `max_length`, by default the number of positions."""
        if max_length is not None and max_length > self.positions:
            msg = (
                f"max_length={max_length:,} is more than the {self.positions:,} positions of "
                f"{self.name!r}. Use {self.positions:,} or less."
            )
            raise ValueError(msg)
        return max_length or self.positions


def read_checkpoint(folder: Path, name: str, pooling: str = "auto") -> Checkpoint:
    """Read the facts of a checkpoint and check that no file is missing or cut short.

    Links in the folder are followed wherever they lead. `name` is for messages and the fingerprint,
    `pooling` is `"auto"`, as the files say, or `"cls"` or `"mean"`.
    """
    root, folder = folder, transformer_folder(folder)
    config = read_json(folder / "config.json")
    _refuse_redirects(config, folder)
    _refuse_code(config, folder / "config.json", "AutoModel")
    _refuse_classifier(config, folder / "config.json")
    _check_tokenizer(folder)
    modules = read_modules(root, pooling)
    layers = [layer for layer in modules.layers if layer is not None]
    heads = [folder / head for head in HEADS if (folder / head).exists()]
    weights = [
        file
        for part in (folder, *(layer.folder for layer in layers))
        for file in weight_files(part)
    ]
    for file in (*weights, *heads):
        check_container(file)
    small = [folder / name for name in SMALL_FILES]
    return Checkpoint(
        folder=folder,
        name=name,
        digest=digest_of(root, [*small, *weights], _digested(modules)),
        has_heads=len(heads) == len(HEADS),
        dimension=layers[-1].outputs if layers else _number(config, _WIDTHS, folder),
        positions=_positions(config, modules, folder),
        modules=modules,
    )


def _digested(modules: Modules) -> str:
    """Settings that change the vectors and are in no file that is in the digest whole."""
    layers = [layer and (layer.folder.name, *layer[1:]) for layer in modules.layers]
    return repr((modules.lower_case, layers)) if modules.lower_case or layers else ""


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare names and shapes of all tensors with the model, without running code of the files."""
    files = weight_files(checkpoint.folder)
    for file in files:
        shapes(file)  # names the one that is damaged
    encoder, found = _load_without_data(checkpoint.folder)
    _check_fit(files[0], encoder, found)
    if checkpoint.has_heads:
        _check_heads(checkpoint.folder, encoder.config.hidden_size)
    for layer in checkpoint.modules.layers:
        if layer is not None:
            _check_layer(layer)


def _check_fit(file: Path, encoder: Any, found: dict[str, Any]) -> None:
    """Reject weights of which transformers would fill in some, or drop some of the encoder's."""
    _refuse_additions(file, found["unexpected_keys"])
    for name, stored, expected in sorted(found["mismatched_keys"]):
        if not name.startswith(_UNUSED):
            shape = tuple(stored)
            reason = f"its tensor {name} is {shape}, and config.json makes it {tuple(expected)}"
            raise _mismatched(file, reason)
    missing = [name for name in found["missing_keys"] if not name.startswith(_UNUSED)]
    if missing:
        reason = f"{len(missing)} tensors that config.json asks for are missing, {min(missing)} "
        raise _mismatched(file, f"{reason}among them")
    parts = {part for part, _ in encoder.named_children()}
    for name in sorted(found["unexpected_keys"]):
        own = name.removeprefix(f"{encoder.base_model_prefix}.")
        if own.partition(".")[0] in parts and not own.startswith(_UNUSED):
            raise _mismatched(file, f"config.json has no layer for its tensor {name}")


def _refuse_additions(file: Path, names: Iterable[str]) -> None:
    """Reject additions that make another model of the encoder."""
    for name in sorted(names):
        if "lora_" in name or "adapter" in name:
            msg = (
                f"The weights in {file} hold an adapter beside the model ({name}). Merge it into "
                "them, with merge_and_unload of peft, and save the model."
            )
            raise ValueError(msg)
        if name.startswith(_CLASSIFIERS):
            raise _no_embedder(file, f"the tensor {name}")


def _load_without_data(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Build the model of a checkpoint without its data, and report how the files fit."""
    import transformers

    try:
        loaded: tuple[Any, dict[str, Any]] = transformers.AutoModel.from_pretrained(
            str(folder),
            trust_remote_code=False,
            weights_only=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        ending = "interpreter shutdown" in str(error)  # its threads are refused at exit
        if ending or isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        msg = (
            f"{folder / 'config.json'} describes no model that transformers "
            f"{transformers.__version__} can make: {type(error).__name__}: {first_line(error)}. "
            "Correct it, or take a newer transformers if the model needs one."
        )
        raise ValueError(msg) from error
    config = loaded[0].config
    if config.is_encoder_decoder and config.model_type not in ENCODERS_OF_PAIRS:
        msg = (
            f"{folder / 'config.json'} describes {config.model_type}, an encoder-decoder model; "
            f"of these {', '.join(ENCODERS_OF_PAIRS)} are supported. "
            "Use an encoder, such as BAAI/bge-m3."
        )
        raise ValueError(msg)
    return loaded


def _check_heads(folder: Path, width: int) -> None:
    for name in HEADS:
        found = shapes(folder / name)
        rows = (1,) if name == HEADS[1] else found.get("weight", ())[:1] or (width,)
        expected = {"weight": (*rows, width), "bias": rows}
        if found != expected:
            raise _mismatched(folder / name, f"its tensors are {found} instead of {expected}")


def _check_layer(layer: Dense) -> None:
    [file] = weight_files(layer.folder)
    found = shapes(file)
    if found != layer.shapes():
        raise _mismatched(file, f"its tensors are {found} instead of {layer.shapes()}")


def check_vocabulary(tokenizer: Any, rows: int, folder: Path) -> None:
    """Check that every token has one of the rows of the embedding matrix."""
    ids = set(tokenizer.get_vocab().values())
    if max(ids, default=0) >= rows:
        msg = (
            f"The tokenizer in {folder} has token ids up to {max(ids):,}, and the model has "
            f"embeddings for {rows:,}. Take both from the same checkpoint."
        )
        raise ValueError(msg)
    if ids <= set(tokenizer.all_special_ids):
        msg = (
            f"The tokenizer in {folder} has special tokens alone: its vocabulary file "
            "is missing or of another kind of model. Copy it from where the weights came from."
        )
        raise ValueError(msg)


def _mismatched(file: Path, reason: str) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"The weights in {file} belong to another model than config.json: {reason}. "
        "Take all files from the same checkpoint."
    )


def _refuse_redirects(config: dict[str, Any], folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        msg = (
            f"The checkpoint folder {folder} holds an adapter (adapter_config.json). Merge it into "
            "the weights, and remove its files."
        )
        raise ValueError(msg)
    for key in _REDIRECTING_SETTINGS:
        if config.get(key):
            msg = (
                f"{folder / 'config.json'} sets {key}={config[key]!r}, which would load "
                "something else than the checkpoint's own weights and code. "
                "Remove it from the file."
            )
            raise ValueError(msg)


def _refuse_code(config: dict[str, Any], file: Path, kind: str) -> None:
    """Reject a model or tokenizer of which transformers has at best a namesake."""
    mapped = config.get("auto_map")
    code = mapped.get(kind) if isinstance(mapped, dict) else mapped
    if code:
        msg = (
            f"{file} refers to custom code ({code}), which is never run, and without which the "
            "vectors may differ. Use a checkpoint that transformers runs by itself, or remove "
            "auto_map if you know that this one is."
        )
        raise ValueError(msg)


def _refuse_classifier(config: dict[str, Any], file: Path) -> None:
    name = str(config.get("architectures"))
    if "ForSequenceClassification" in name:
        raise _no_embedder(file, name)


def _no_embedder(file: Path, sign: str) -> ValueError:
    return ValueError(
        f"{file} is of a reranker or another classifier ({sign}): a cross-encoder scores pairs of "
        "texts and gives no vectors. Use an embedding model, such as BAAI/bge-m3."
    )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in TOKENIZERS):
        msg = (
            f"The checkpoint folder {folder} has no tokenizer (one of {', '.join(TOKENIZERS)}). "
            "Copy it there from where the weights came from."
        )
        raise FileNotFoundError(msg)
    for name in TOKENIZER_SETTINGS:
        if (folder / name).exists():
            _refuse_code(read_json(folder / name), folder / name, "AutoTokenizer")


def _number(config: dict[str, Any], names: tuple[str, ...], folder: Path, least: int = 1) -> int:
    name = next((name for name in names if name in config), names[0])
    value = config.get(name)
    if not isinstance(value, int) or value < least:
        msg = (
            f"{folder / 'config.json'} has {value!r} for {name}, which must be a number of {least} "
            "or more. Correct it to the model's own."
        )
        raise ValueError(msg)
    return value


def _positions(config: dict[str, Any], modules: Modules, folder: Path) -> int:
    family = str(config.get("model_type"))
    if family in ENCODERS_OF_PAIRS:  # positions are relative: texts may be as long as one likes
        trained = _number({"n_positions": 512, **config}, ("n_positions",), folder)
        return max(modules.longest or 0, trained)
    positions = _number(config, _POSITIONS, folder)
    if not any(name in family for name in _OFFSET_POSITIONS):
        return positions
    padding = _number({"pad_token_id": 1, **config}, ("pad_token_id",), folder, least=0)
    return positions - padding - 1
