"""Says what an example needs where that is not installed, by the first line of its file.

Each example imports this before any package.
"""

import sys
from pathlib import Path
from types import TracebackType

MAIN = sys.modules["__main__"]


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print a missing package and the first line of the example instead of a traceback."""
    if isinstance(error, ModuleNotFoundError):
        line = (MAIN.__doc__ or "").partition("\n")[0]
        missing = f"{error.name} is not installed." if error.name else str(error)
        print(missing, line, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(getattr(MAIN, "__file__", None) or "").parent == Path(__file__).parent:
    sys.excepthook = explain
