"""The notebook prints what it holds."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SHOWN = {"text/html", "image/png"}


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell prints, and in which forms it shows something."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        output["text"] if output.output_type == "stream" else str(SHOWN & output["data"].keys())
        for output in outputs
        if output.get("name") != "stderr"
    ]


@pytest.mark.filterwarnings("ignore:Proactor event loop:RuntimeWarning")  # of zmq on Windows
@pytest.mark.usefixtures("small_checkpoint")  # built once, in the cache in which `build` looks
def test_the_notebook_prints_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    held = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": EXAMPLES}}).execute()
    assert printed(notebook) == held
    assert "image/png" in str(held)


def test_the_notebook_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 60_000
