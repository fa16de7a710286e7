"""Every command of a task: help, stdin, outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.cli.toy_models import Call, classifier_in
from tests.engine.tasks.fakes import ToyDecoder, ToyRunner, manifest
from typer.testing import CliRunner

from pipeload.cli import app
from pipeload.errors import ConfigError

pytest.importorskip("tokenizers")


@pytest.mark.parametrize(
    ("stdin", "message"), [(b"", "stdin has no text"), (b" \n", "stdin has no text"), (b"a\xff", "no UTF-8 text")]
)
@pytest.mark.parametrize("command", ["embed", "classify", "generate"])
def test_stdin_without_text_is_refused(tmp_path: Path, call: Call, command: str, stdin: bytes, message: str) -> None:
    result = call(classifier_in(tmp_path), command, "-", stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_error_leaves_stdout_empty(tmp_path: Path, call: Call) -> None:
    result = call(ToyDecoder(tmp_path), "generate", "the cat")
    assert isinstance(result.exception, ConfigError)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "command", ["run", "embed", "classify", "zero-shot", "rerank", "answer", "fill-mask", "generate", "chat"]
)
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"pipeload {command} models/" in result.stdout
    assert "--budget" in result.stdout


@pytest.mark.parametrize("command", [("embed", "a text"), ("run", "--random")])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, call: Call, command: tuple[str, ...]
) -> None:
    runner = ToyRunner(tmp_path, manifest("feature-extraction"), lambda _: pytest.fail("the model ran"))
    result = call(runner, *command, f"--output={tmp_path}/missing/out.npz")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
