"""Commands of the command line that run on toy models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.cli.toy_models import Call, ToyModel
from typer.testing import CliRunner, Result

import pipeload
from pipeload.cli import app


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """How `pipeload.load` was called."""
    return []


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, loads: list[tuple[Any, ...]]) -> Call:
    """Run a command on a toy model; `call(runner, "embed", ...)` puts the directory after the command."""

    def run(runner: Any, command: str, *arguments: str, stdin: str | bytes = "") -> Result:
        model = ToyModel(runner)

        def load(path: Path, memory_budget: str, **options: Any) -> ToyModel:
            loads.append((path, memory_budget, options))
            return model

        monkeypatch.setattr(pipeload, "load", load)
        result = CliRunner().invoke(app, [command, str(runner.directory), *arguments], input=stdin)
        assert model.closed or not loads
        return result

    return run
