"""Two replicas on a local Ray Serve, which `replicas_process.py` runs; one is killed under load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from replicas_process import CALLERS


def test_a_replica_that_is_killed_costs_no_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "replicas_process.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(tiny_checkpoint), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["replicas"]) == 3  # two, and the one that took the place of the killed one
    assert len(result["called"]) == CALLERS
    for called in result["called"]:
        assert called["errors"] == []
        assert called["wrong"] == 0
        assert called["right"] > 0
