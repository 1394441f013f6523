"""`BGEM3FlagModel` without the rest of FlagEmbedding.

`import FlagEmbedding` runs every trainer and reranker in it: seconds, and an error with each
release of transformers that takes away something that one of them wants. Here the files of the M3
embedder alone run, with an `import` of their own. Their modules stay out of `sys.modules`, so
whatever else imports FlagEmbedding, at any time and in any thread, does not meet them.
"""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from FlagEmbedding import BGEM3FlagModel

_PACKAGE = "FlagEmbedding"
_EMBEDDER = f"{_PACKAGE}.inference.embedder.encoder_only.m3"
_LOADER = f"{_PACKAGE}.finetune.embedder.encoder_only.m3.runner"  # a trainer's; reads the weights
_MODULES = (
    _EMBEDDER,
    _LOADER,
    f"{_PACKAGE}.finetune.embedder.encoder_only.m3.modeling",
    f"{_PACKAGE}.abc.finetune.embedder.AbsModeling",
    f"{_PACKAGE}.abc.inference.AbsEmbedder",
    f"{_PACKAGE}.utils.tokenizer_compat",
)


@cache
def flag_model_class() -> type[BGEM3FlagModel]:
    """Import `BGEM3FlagModel`, without the rest of FlagEmbedding if possible."""
    try:
        embedder: type[BGEM3FlagModel] = _Importer().module(_EMBEDDER).M3Embedder
    except (ImportError, OSError, AttributeError):
        return _class_of_package()
    return embedder


def _class_of_package() -> type[BGEM3FlagModel]:
    try:
        from FlagEmbedding import BGEM3FlagModel
    except ImportError as error:
        installed = [f"{name} {installed_version(name)}" for name in (_PACKAGE, "transformers")]
        msg = (
            f"{' and '.join(installed)} do not work together: {error}. Install the versions that "
            "constraints.txt of langchain-bge-dense pins."
        )
        raise ImportError(msg) from error
    return cast("type[BGEM3FlagModel]", BGEM3FlagModel)


def installed_version(name: str) -> str:
    """Read the version of a distribution, or say that it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class _Importer:
    """Runs `_MODULES` from FlagEmbedding's folder, each once, and no other file of it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec(_PACKAGE)  # runs nothing
        if spec is None or not spec.submodule_search_locations:
            msg = f"No module named {_PACKAGE!r}"
            raise ModuleNotFoundError(msg, name=_PACKAGE)
        self._parent = Path(spec.submodule_search_locations[0]).parent
        self._modules: dict[str, ModuleType] = {}

    def module(self, name: str) -> Any:
        """Run one of `_MODULES`, unless it has run."""
        if name not in self._modules:
            file = self._parent.joinpath(*name.split(".")).with_suffix(".py")
            loader = SourceFileLoader(name, str(file))
            module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(file)))
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
            loader.exec_module(module)
            self._modules[name] = module
        return self._modules[name]

    def _import(
        self,
        name: str,
        importer: dict[str, Any] | None = None,
        variables: Any = None,
        names: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`import` for these modules: of FlagEmbedding they get each other."""
        if importer is not None and level:
            name = importlib.util.resolve_name("." * level + name, importer["__package__"])
        if name.partition(".")[0] != _PACKAGE:
            return __import__(name, importer, variables, names or ())
        found = ModuleType(name)
        for wanted in names or ():
            setattr(found, wanted, self._find(name, wanted, (importer or {}).get("__name__")))
        return found

    def _find(self, package: str, wanted: str, importer: str | None) -> Any:
        for name in _MODULES:
            inside = f"{name}.".startswith(f"{package}.")
            if inside and hasattr(module := self.module(name), wanted):
                return getattr(module, wanted)
        if importer == _LOADER:
            return type(wanted, (), {})  # of training: subclassed or an annotation, and never used
        msg = f"cannot import name {wanted!r} from {package!r}"
        raise ImportError(msg)
