"""A run writes its own cache and what the user names, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import REPOSITORY, make


def test_a_run_writes_nothing_outside_the_cache_of_pipeload(tmp_path: Path) -> None:
    """onnxruntime wrote `~/.cache/Microsoft/DeveloperTools/.onnxruntime` as soon as it was imported."""
    pytest.importorskip("onnx")
    model = make(tmp_path / "models", "toy")
    before = set(model.rglob("*"))
    for name in ("home", "work", "temporary"):
        (tmp_path / name).mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "PIPELOAD_CACHE")}
    kept.pop("ORT_DISABLE_TELEMETRY", None)
    roots = os.pathsep.join(str(REPOSITORY / name) for name in ("engine", "exporter"))
    done = subprocess.run(
        [sys.executable, "-m", "pipeload", "run", str(model), "--random", "--passes=3"],
        cwd=tmp_path / "work",
        env=kept
        | {
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "temporary"),
            "PYTHONPATH": roots,
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    cache = tmp_path / "home" / ".cache" / "pipeload"
    written = [path for folder in ("home", "work", "temporary") for path in (tmp_path / folder).rglob("*")]
    assert [path for path in written if path.is_file() and cache not in path.parents] == []
    assert set(model.rglob("*")) == before
