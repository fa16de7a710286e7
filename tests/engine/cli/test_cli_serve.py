"""`pipeload serve`: what it refuses before it opens a model or a port."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeload.cli import app
from pipeload.errors import ConfigError

pytest.importorskip("uvicorn")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings with which the server was started."""
    found: list[Any] = []
    monkeypatch.setattr(
        "pipeload.serve.server.serve", lambda settings, tell, **_: (found.append(settings), tell("http://x"))
    )
    return found


def _serve(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_options_become_settings(served: list[Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    alias = f"gpt={tmp_path / 'b'}"
    result = _serve(
        tmp_path / "a", tmp_path / "b", "--budget", "1GB", "--host", "0.0.0.0", "--port", 0, "--api-key-file", keys,
        "--alias", alias, "--max-waiting", 3, "--idle", "1.5m", "--cors-origin", "https://x",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == "http://x\n"
    (made,) = served
    assert made.directories == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert made.aliases == {"gpt": "b"}
    assert (made.budget, made.host, made.port, made.max_waiting, made.idle_s) == ("1GB", "0.0.0.0", 0, 3, 90.0)
    assert made.keys == (b"one", b"two")
    assert made.cors_origins == ("https://x",)
    assert made.log_format == "text"


@pytest.mark.parametrize("names", [[], ["bert-large"]])
def test_models_of_a_cluster_have_no_directories(served: list[Any], tmp_path: Path, names: list[str]) -> None:
    address = "tls://10.0.0.1:8786"
    result = _serve(*names, "--cluster", address, "--certificates", tmp_path, "--alias", "gpt=bert-large")
    assert result.exit_code == 0, result.output
    (made,) = served
    assert (made.directories, made.names, made.aliases) == ({}, (*names,), {"gpt": "bert-large"})
    assert (made.cluster, made.certificates) == (address, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name a sharded model directory, or a cluster with --cluster."),
        (["--cluster", "tls://10.0.0.1:8786", "--prefix-cache", "1MB"], "--prefix-cache is for models of this machine"),
    ],
)
def test_there_are_models_to_serve(served: list[Any], arguments: list[str], words: str) -> None:
    result = _serve(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not served


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "Other machines reach --host 0.0.0.0: give --api-key-file, or say --no-auth"),
        (["--host", "board"], "Other machines reach --host board"),
        (["--no-auth", "--api-key-file", "{keys}"], "both given"),
        (["--api-key-file", "{empty}"], "has no API key"),
        (["--alias", "gpt"], "Write --alias as NAME=VALUE"),
        (["--alias", "gpt=elsewhere"], "none of the models to serve"),
        (["--alias", "a={a}"], "the name of a model already"),
        (["--idle", "soon"], "such as 60s"),
        (["{other}/a"], "Two models have the name a"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(
    served: list[Any], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "keys").write_text("one")
    (tmp_path / "empty").write_text("\n")
    places = {name: str(tmp_path / name) for name in ("a", "keys", "empty", "other")}
    result = _serve(tmp_path / "a", *(one.format(**places) for one in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert not served


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_this_machine_alone_needs_no_key(served: list[Any], tmp_path: Path, host: str) -> None:
    assert _serve(tmp_path / "a", "--host", host).exit_code == 0


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("uvicorn", "pipeload.serve."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = _serve(tmp_path / "a")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == (
        "The server needs the package uvicorn: pip install starlette uvicorn prometheus-client."
    )
