"""The smallest budget that `plan` names works for the commands that run the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine.tasks.fakes import write_bert_tokenizer
from tests.models import REPOSITORY, make


def _pipeload(cache: Path, *arguments: str) -> str:
    roots = os.pathsep.join(str(REPOSITORY / name) for name in ("engine", "exporter"))
    done = subprocess.run(
        [sys.executable, "-m", "pipeload", *arguments],
        env=os.environ | {"PYTHONPATH": roots, "PIPELOAD_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [("run", "--random"), ("embed", "the cat")], ids=lambda command: command[0])
def test_the_smallest_budget_of_plan_works_for_commands(tmp_path: Path, command: tuple[str, str]) -> None:
    """It left out what commands import and open: `embed` needed 13 MB more than the figure of `plan`."""
    pytest.importorskip("onnx")
    pytest.importorskip("tokenizers")
    directory = make(tmp_path / "models", "toy-large")
    write_bert_tokenizer(directory)
    planned = json.loads(_pipeload(tmp_path, "plan", str(directory), "--budget=8GB", "--json"))
    smallest = planned["smallest_budget_bytes"]
    for _ in range(3):
        _pipeload(tmp_path, command[0], str(directory), command[1], f"--budget={smallest}")
