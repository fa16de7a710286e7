"""The names that `import pipeload` gives, and the modules that it does not pull in."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import subprocess
import sys

import pytest
from tests.engine.harness import EMULATED, PATIENCE_S

import pipeload

_FOREIGN = ("onnx", "optimum", "torch", "transformers", "tokenizers", "jinja2", "PIL", "matplotlib", "pipeload_export")


def test_the_public_names_are_pinned() -> None:
    assert pipeload.__all__ == [
        "Answer",
        "Budget",
        "BudgetError",
        "ClosedError",
        "ClusterError",
        "ConfigError",
        "DeadlineError",
        "DecodeState",
        "EmbeddingWarning",
        "Entity",
        "ExportError",
        "FilledMask",
        "Generation",
        "Label",
        "LoadError",
        "ManifestError",
        "Model",
        "NewToken",
        "PipeloadError",
        "Plan",
        "Profile",
        "Progress",
        "Ranked",
        "QuantisationWarning",
        "RunError",
        "Session",
        "ShardError",
        "Stats",
        "TextStream",
        "TruncationWarning",
        "connect",
        "deadline",
        "load",
    ]


def test_every_public_name_is_there_and_documented() -> None:
    for name in pipeload.__all__:
        assert getattr(pipeload, name).__doc__, name


def test_the_map_of_modules_is_complete() -> None:
    assert pipeload.__doc__ is not None
    for module in pkgutil.iter_modules(pipeload.__path__):
        if not module.name.startswith("_"):
            assert f"\n{module.name}" in pipeload.__doc__, f"the docstring of pipeload does not mention {module.name}"


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "format.manifest",
        "storage.weights",
        "planning.planner",
        "pipeline.reservations",
        "pipeline.exchange",
        "model",
    ],
)
def test_every_name_in_all_exists(module: str) -> None:
    found = importlib.import_module(f"pipeload.{module}")
    assert not [name for name in found.__all__ if not hasattr(found, name)]


@pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")
def test_importing_pipeload_imports_no_framework() -> None:
    program = "import json, sys, pipeload; pipeload.load; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(next(iter(pipeload.__path__)).removesuffix("/pipeload"))},
        capture_output=True,
        check=True,
        text=True,
        timeout=PATIENCE_S,
    )
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert roots.isdisjoint(_FOREIGN)
    assert {"numpy", "onnxruntime"} <= roots
