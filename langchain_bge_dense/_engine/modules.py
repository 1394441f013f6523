"""Files of sentence-transformers, read in one place.

They name the modules behind the transformer, the prompts, and settings of the tokenizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_bge_dense._engine.files import damaged, read_json

if TYPE_CHECKING:
    from pathlib import Path

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
_PROMPTS_FILE = "config_sentence_transformers.json"
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
MODULES_FILES = (MODULES_FILE, POOLING_FILE, _PROMPTS_FILE, *_TRANSFORMER_FILES)

_POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_ACTIVATIONS = ("ELU", "GELU", "Identity", "LeakyReLU", "Mish", "ReLU", "SiLU", "Sigmoid", "Tanh")
# Settings of sentence-transformers' Transformer that change vectors, and what they may be.
_TRANSFORMER_SETTINGS: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"method": "forward", "method_output_name": "last_hidden_state"},  # of texts
    "module_output_name": "token_embeddings",
}
_TRANSFORMER_ARGUMENTS = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "config_args",
    "config_kwargs",
    "processing_kwargs",
    "query_expansion",
)


class Prompts(NamedTuple):
    """Texts that a checkpoint's authors put in front of others; may be empty."""

    query: str = ""
    document: str = ""


_NO_PROMPTS = Prompts()


class Dense(NamedTuple):
    """A layer behind the pooling: `activation(x W^T + b)`, and x with it where it is residual."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str
    residual: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        weight = (self.outputs, self.inputs)
        found: dict[str, tuple[int, ...]] = {"linear.weight": weight}
        if self.bias:
            found["linear.bias"] = (self.outputs,)
        if self.residual and self.inputs != self.outputs:
            found["residual.weight"] = weight
        return found


@dataclass(frozen=True)
class Modules:
    """Steps before and behind the transformer, as a checkpoint asks for them.

    Attributes:
        pooling: `"cls"` or `"mean"`.
        pools_prompt: Whether the tokens of a prompt are pooled with those of the text.
        lower_case: Whether texts are tokenised in lower case.
        layers: Behind the pooling; None scales to unit length. A last scaling is left out.
        prompts: What goes in front of texts.
        longest: Tokens that sentence-transformers cuts texts to, or None if unstated.
    """

    pooling: str
    pools_prompt: bool = True
    lower_case: bool = False
    layers: tuple[Dense | None, ...] = ()
    prompts: Prompts = _NO_PROMPTS
    longest: int | None = None


class Module(NamedTuple):
    """An entry of `modules.json`."""

    kind: str
    path: str


def listed_modules(folder: Path) -> list[Module]:
    """List the modules of a model in order. Without `modules.json` they are BGE-M3's."""
    file = folder / MODULES_FILE
    if not file.exists():
        pooling = [Module("Pooling", "1_Pooling")] if (folder / POOLING_FILE).exists() else []
        return [Module("Transformer", ""), *pooling]
    try:
        modules = [
            Module(_kind(entry["type"]), entry.get("path") or "") for entry in read_json(file, list)
        ]
        inside = all(re.fullmatch(r"(?!\.)[\w. -]*", module.path) for module in modules)
    except (AttributeError, KeyError, TypeError) as error:
        raise damaged(file, "its entries are not modules") from error
    if not inside or not modules:
        raise damaged(file, "its modules are not in folders beside it")
    return modules


def _kind(path: str) -> str:
    """Name a class of sentence-transformers without its module, from which it may move."""
    return path.rpartition(".")[2] if path.startswith("sentence_transformers.") else path


def transformer_folder(folder: Path) -> Path:
    """Find the transformer of a model, in its own folder or one below."""
    return folder / listed_modules(folder)[0].path


def read_modules(folder: Path, pooling: str) -> Modules:
    """Read the steps around the transformer. `pooling` overrides the files."""
    modules = listed_modules(folder)
    _check_kinds(folder, modules)
    pooled = next((folder / path for kind, path in modules if kind == "Pooling"), None)
    if pooling == "auto":
        _refuse_part(folder, modules)
        pooling = "cls" if pooled is None else _pooling(pooled / "config.json")
    kinds = modules[2:]
    if kinds and kinds[-1].kind == "Normalize":
        kinds = kinds[:-1]
    transformer = _transformer_settings(folder / modules[0].path)
    return Modules(
        pooling,
        pools_prompt=pooled is None or _pools_prompt(pooled / "config.json"),
        lower_case=bool(transformer.get("do_lower_case")),
        layers=tuple(
            None if kind == "Normalize" else _dense(folder / path)
            for kind, path in kinds
            if kind != "Dropout"
        ),
        prompts=_prompts(folder / _PROMPTS_FILE),
        longest=transformer.get("max_seq_length"),
    )


def _optional(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(file) if file.exists() else {}
    return content


def _check_kinds(folder: Path, modules: list[Module]) -> None:
    kinds = [("Transformer",), ("Pooling",)]
    later = ("Dense", "Dropout", "Normalize")
    for number, module in enumerate(modules):
        if module.kind not in (kinds[number] if number < len(kinds) else later):
            msg = (
                f"{folder / MODULES_FILE} lists {module.kind!r} as module {number}, which is not "
                "supported there: a Transformer and a Pooling of sentence-transformers come first, "
                f"then {', '.join(later)}. Use sentence-transformers for this model."
            )
            raise ValueError(msg)


def _refuse_part(folder: Path, modules: list[Module]) -> None:
    """Reject the folder of a transformer that is one module of a model."""
    whole = folder.parent
    if (folder / MODULES_FILE).exists() and len(modules) == 1:
        msg = (
            f"{folder / MODULES_FILE} lists no Pooling. Pass "
            'pooling="cls" or "mean", as the model was trained.'
        )
        raise ValueError(msg)
    if (folder / MODULES_FILE).exists() or not (whole / MODULES_FILE).exists():
        return
    if folder.name in [module.path for module in listed_modules(whole)]:
        msg = (
            f"The folder {folder} is the transformer alone of the model in {whole}, whose "
            f'{MODULES_FILE} says how to pool. Pass {whole}, or pooling="cls" or "mean".'
        )
        raise ValueError(msg)


def _pooling(file: Path) -> str:
    if not file.exists():
        msg = (
            f"The file {file} is missing, which says how to pool. Copy it there from where the "
            'model came from, or pass pooling="cls" or "mean", as the model was trained.'
        )
        raise FileNotFoundError(msg)
    config = read_json(file)
    prefix = "pooling_mode_"
    modes = [key[len(prefix) :] for key, on in config.items() if on is True and prefix in key]
    named = config.get("pooling_mode") or modes or ["mean"]
    mode = named if isinstance(named, str) else "+".join(map(str, named))
    if mode not in _POOLINGS:
        msg = (
            f"{file} asks for {mode} pooling, and only cls and mean are supported. "
            'Set pooling="cls" or pooling="mean" if that is what the model was trained for.'
        )
        raise ValueError(msg)
    return _POOLINGS[mode]


def _pools_prompt(file: Path) -> bool:
    return _optional(file).get("include_prompt") is not False


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = read_json(file)
    try:
        layer = Dense(
            folder,
            int(config["in_features"]),
            int(config["out_features"]),
            bias=config.get("bias", True) is True,
            activation=config.get("activation_function", "torch.nn.Tanh"),
            residual=config.get("use_residual", False) is True,
        )
        known = layer.activation.startswith("torch.nn.")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from error
    names = {
        config.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")
    }
    activation = layer.activation.rpartition(".")[2]
    if not known or activation not in _ACTIVATIONS or names != {"sentence_embedding"}:
        msg = (
            f"{file} asks for {layer.activation} of {sorted(names)}; supported are "
            f"{', '.join(_ACTIVATIONS)} of torch.nn on the pooled vector. "
            "Use sentence-transformers for this model."
        )
        raise ValueError(msg)
    return layer._replace(activation=activation)


def _transformer_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of the transformer, and reject those that are not supported."""
    file = next((folder / n for n in _TRANSFORMER_FILES if (folder / n).exists()), None)
    if file is None:
        return {}
    config: dict[str, Any] = read_json(file)
    usual = _TRANSFORMER_SETTINGS | {name: {} for name in _TRANSFORMER_ARGUMENTS}
    for name, expected in usual.items():
        value = config.get(name) or expected
        if name == "modality_config" and name in config:
            value = dict(value).get("text")
        if value != expected:
            msg = (
                f"{file} sets {name}={config[name]!r}, which is not supported. Remove it if the "
                "model gives the right vectors without, or use sentence-transformers."
            )
            raise ValueError(msg)
    longest = config.get("max_seq_length")
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise damaged(file, f"its max_seq_length is {longest!r}")
    return config


def _prompts(file: Path) -> Prompts:
    """Read the prompts of queries and documents, or the default one for both."""
    config = _optional(file)
    named = config.get("prompts") or {}
    if not isinstance(named, dict) or {type(text) for text in named.values()} - {str, type(None)}:
        raise damaged(file, f"its prompts are {named!r}")
    query, document = (
        next(filter(None, map(named.get, names)), "")
        for names in (_QUERY_PROMPTS, _DOCUMENT_PROMPTS)
    )
    if query or document:
        return Prompts(query, document)
    default = named.get(config.get("default_prompt_name")) or ""
    return Prompts(default, default)
