"""`pipeload profile`: its output, the profile that it keeps, the options that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeload.cli import app
from pipeload.format import manifest as manifests
from pipeload.measuring import bandwidth, profile_store
from pipeload.measuring import stopwatch as stopwatches
from pipeload.measuring.profiler import profile_dims


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bandwidth, "_SMALL_MODEL_S", 0.0)
    monkeypatch.setattr(stopwatches, "_RUNS", 1)
    monkeypatch.setattr(stopwatches, "_CHOSEN_S", 0.0)
    monkeypatch.delenv("PIPELOAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pipeload" / "profiles"


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def test_it_prints_reading_shards_and_memory(toy: Path, own_store: Path) -> None:
    result = _call(toy, "--threads=1")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines()]
    begin = next(i for i, line in enumerate(lines) if line[:1] == ["agents"])
    assert [line[0] for line in lines[begin + 1 : begin + 5]] == ["1", "2", "4", "8"]
    assert "shards with 1 thread, ms" in result.stdout
    assert "with 2 threads" not in result.stdout
    rows = {line[0]: line for line in lines if line}
    assert rows["prologue"][1] == rows["epilogue"][1] == "1"
    assert rows["block.000"][1:4] == ["..", "block.005", "6"]
    assert rows["all"][1] == "8"
    assert "process" in rows
    assert "cache of a token" not in result.stdout
    assert result.stdout.splitlines()[-1] == f"kept in {next(own_store.iterdir())}"


def test_the_cores_that_it_ran_on_are_told_where_one_is_little(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel refuses to pin a thread to these, which is no error.
    monkeypatch.setattr("pipeload.measuring.profiler.core_capacities", lambda: {900: 1024, 901: 400})
    result = _call(toy, "--threads=1")
    assert result.exit_code == 0, result.output
    assert "shards with 1 thread, computing on 900, reading on 901, ms" in result.stdout


def test_a_model_with_caches_has_its_decode_step_and_the_cache_of_a_token(toy_decoder: Path) -> None:
    result = _call(toy_decoder, "--threads=1")
    assert result.stdout.splitlines()[0].endswith("batch_size=1 sequence_length=1 past_sequence_length=128")
    assert "cache of a token  1.0 kB" in result.stdout


def test_what_it_measured_is_kept_and_written(toy: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.json"
    assert _call(toy, "--size=sequence_length=3", "-o", output, "--threads=1").exit_code == 0
    dims = profile_dims(manifests.read(toy), {"sequence_length": 3})
    kept, written = profile_store.find(toy, dims), profile_store.read(output)
    assert kept is not None
    assert kept.measured
    assert kept.times == written.times
    assert written.dims == dims
    assert profile_store.find(toy, profile_dims(manifests.read(toy))) is None


def test_json_has_everything(toy: Path, own_store: Path) -> None:
    found = json.loads(_call(toy, "--json", "--threads=1").stdout)
    assert found["kept"] == str(next(own_store.iterdir()))
    assert set(found["profile"]["read_bytes_per_s"]) == {"1", "2", "4", "8"}
    assert len(found["profile"]["times"]["1"]) == 8
    assert found["profile"]["process_bytes"] > 0


def test_a_store_that_cannot_be_written_is_said_and_is_no_failure(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    result = _call(toy, "--threads=1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("not kept: ")
    assert json.loads(_call(toy, "--json", "--threads=1").stdout)["kept"] is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--size=sequence_length", "Write --size as NAME=VALUE"),
        ("--size=sequence_length=many", "must be a number"),
        ("--threads=0", "--threads"),
        ("--output=/missing/one.json", "cannot be written"),
    ],
)
def test_what_it_cannot_use_is_refused_before_the_work(
    toy: Path, argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeload.cli.commands.profile.measure_model", lambda *_, **__: pytest.fail("it measured"))
    result = _call(toy, argument)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_dimension_that_the_model_does_not_have_is_named(toy: Path) -> None:
    result = _call(toy, "--size=height=3")
    assert result.exit_code == 1
    assert "no dimension ['height']" in str(result.exception)


def test_help_has_examples() -> None:
    result = _call("--help")
    assert result.exit_code == 0
    assert "pipeload profile models/" in result.stdout
