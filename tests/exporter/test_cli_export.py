"""The commands export, inspect and verify: their output, its stream, and their exit codes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.exporter.graphs import encoder
from tests.exporter.models import write_json, write_onnx

import pipeload
import pipeload_export
from pipeload import cli
from pipeload.format.manifest import read

Run = Callable[..., tuple[int, str, str]]
"""Arguments -> exit code, stdout, stderr."""

RUN = [sys.executable, "-c", "from pipeload.cli import main; main()"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "toy"})
    return write_onnx(tmp_path / "model.onnx")


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    pipeload_export.export(source, tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["pipeload", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize("command", ["export", "inspect", "verify", "run", "embed", "classify", "generate"])
def test_help_has_examples(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"pipeload {command}" in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"pipeload {pipeload.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["export"], ["export", "a", "b", "--no-such"], ["export", "a", "b", "--opset", "x"]]
)
def test_wrong_usage(run: Run, arguments: Sequence[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.splitlines()[1:] == ["Try 'pipeload export --help'."]


def test_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ("export", tmp_path / "none.onnx", tmp_path / "target"),
        ("export", "catalog:none", tmp_path / "target"),
        ("inspect", tmp_path),
        ("verify", tmp_path),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_export(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("export", source, tmp_path / "target")
    assert (code, err) == (0, ""), "no bars without a terminal"
    manifest = read(tmp_path / "target")
    assert f"{source} -> {tmp_path / 'target'}" in out
    for row in (["shards", str(len(manifest.shards))], ["blocks", "3"], ["model", "type", "toy"]):
        assert row in [line.split() for line in out.splitlines()]
    (checked,) = manifest.verification
    assert ["last_hidden_state", f"{checked.max_abs_error:.2e}", f"{checked.max_rel_error:.2e}", "0.0001"] in [
        line.split() for line in out.splitlines()
    ]


def test_export_as_json(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "export", source, tmp_path / "target", "--json", "--task", "fill-mask", "--keep-onnx", tmp_path / "k"
    )
    found = json.loads(out)
    assert code == 0
    assert (found["task"], found["blocks"], found["target"]) == ("fill-mask", 3, str(tmp_path / "target"))
    assert found["verification"][0]["output"] == "last_hidden_state"
    assert found["directory_bytes"] == sum(record.nbytes for record in read(tmp_path / "target").files)
    assert (tmp_path / "k" / "model.onnx").exists()


def test_export_replaces_with_force(run: Run, source: Path, exported: Path) -> None:
    code, _, err = run("export", source, exported)
    assert code == 1
    assert "--force" in err
    assert run("export", source, exported, "--force")[0] == 0


def test_export_refuses_int8_caches_of_a_model_without_caches(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("export", source, tmp_path / "target", "--kv-cache", "int8")
    assert (code, out) == (1, "")
    assert err.startswith("error: This model has no KV caches that could be int8")
    assert err.count("\n") == 1
    code, _, err = run("export", source, tmp_path / "target", "--kv-cache", "int4")
    assert code == 2
    assert "'model', 'int8'" in err


def test_inspect(run: Run, exported: Path) -> None:
    code, out, _ = run("inspect", exported)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["input_ids", "int64[batch_size,", "sequence_length]"] in lines
    assert [line[1] for line in lines if line[:1] == ["block.001"]] == ["block"]
    assert "[1200, 16]" in out, "the table"


def test_inspect_as_json_needs_only_the_manifest(run: Run, exported: Path) -> None:
    shutil.rmtree(exported / "shards")
    code, out, _ = run("inspect", exported, "--json")
    found = json.loads(out)
    assert code == 0
    assert [shard["role"] for shard in found["shards_in_order"]].count("block") == found["blocks"] == 3
    assert found["largest_shard_bytes"] == max(shard["bytes"] for shard in found["shards_in_order"])


def test_verify(run: Run, exported: Path, source: Path) -> None:
    code, out, err = run("verify", exported, "--against", source)
    assert (code, err) == (0, "")
    assert out.count("  ok ") == 5
    assert "last_hidden_state" in out
    code, out, _ = run("verify", exported)
    assert "skipped" in out
    code, out, _ = run("verify", exported, "--json")
    assert json.loads(out)["report"]["differences"] == []


def test_verify_names_the_damage(run: Run, exported: Path) -> None:
    (exported / "shards" / "block.000.safetensors").unlink()
    (exported / "shards" / "block.002.onnx").write_bytes(b"")
    code, _, err = run("verify", exported)
    assert code == 1
    assert err.startswith("error: 2 faults: ")
    assert err.count("\n") == 1
    assert "'shards/block.000.safetensors' cannot be read" in err
    assert "'shards/block.002.onnx' has 0 bytes" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_while_a_checkpoint_is_traced(number: signal.Signals, code: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "began")
    child = f"import time; open({str(tmp_path / 'began')!r}, 'w').close(); time.sleep(99)"
    script = (
        "from pipeload_export.source import tracing\n"
        f"tracing._CHILD = {child!r}\n"
        "from pipeload.cli import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "export", "catalog:gpt2", str(tmp_path / "target")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    (tmp_path / "began").read_text()  # waits until the child opens it
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in err
    assert out == b""
    assert [path.name for path in tmp_path.iterdir()] == ["began"], "nothing half-made stays"


def test_reader_that_goes_away(exported: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*RUN, "inspect", str(exported)], env=environment(), stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 1


def test_bars_on_a_terminal(source: Path, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*RUN, "export", str(source), str(tmp_path / "target"), "--json"],
        env=environment() | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=end,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the other end was closed
            break
        shown += piece
    os.close(terminal)
    out, _ = process.communicate()
    assert process.returncode == 0
    json.loads(out)
    assert b"check the files" in shown
    assert b"100%" in shown


def test_inspect_imports_nothing_of_the_extra(exported: Path) -> None:
    code = (
        "import sys\nsys.argv = ['pipeload', 'inspect', sys.argv[1]]\nfrom pipeload.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'onnx', 'transformers', 'optimum', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)], env=environment(), stdout=subprocess.PIPE, check=True
    )
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_the_command_and_inspect_say_what_the_weights_are(run: Run, tmp_path: Path) -> None:
    source = encoder(layers=3).save(tmp_path / "model.onnx")
    code, out, err = run(
        "export", source, tmp_path / "small", "--weights", "int4", "--block-size", "16", "--asymmetric"
    )
    assert code == 0, err
    small = read(tmp_path / "small").small_weights
    assert small
    assert (small.bits, small.block_size, small.symmetric) == (4, 16, False)
    for text in (out, run("inspect", tmp_path / "small")[1]):
        assert "int4, 16 to a scale" in text
        assert "each block with its own zero" in text
        assert "worst of its range" in text


def test_convert_makes_what_export_makes_and_inspect_says_what_was_kept(run: Run, tmp_path: Path) -> None:
    source = encoder(layers=3).save(tmp_path / "model.onnx")
    assert run("export", source, tmp_path / "floats")[0] == 0
    options = ("--weights", "int4", "--keep", "fp32:block.000,block.001", "--keep", "int8:block.002")
    code, out, err = run("convert", tmp_path / "floats", tmp_path / "small", *options)
    assert code == 0, err
    for text in (out, run("inspect", tmp_path / "small")[1]):
        assert "wider, fp32: block.000, block.001" in text
        assert "wider, int8: block.002" in text
        assert "what the rounding of each shard does to its own outputs" in text
    assert run("convert", tmp_path / "floats", tmp_path / "none", "--weights", "int4", "--mixed", "much")[0] == 1
    assert not (tmp_path / "none").exists()
