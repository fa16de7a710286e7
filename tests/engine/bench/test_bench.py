"""The parts of `pipeload bench` that need no process: limits, arguments, records, tables."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.engine.bench.records import BOUNDS, record_of, run_of
from typer.testing import CliRunner

from pipeload.bench import cgroup
from pipeload.bench.record import Job, Run, max_error, summarise
from pipeload.bench.spec import PlanFacts, Result, Spec, Unsplit, from_json, to_json
from pipeload.bench.table import markdown, table
from pipeload.bench.workload import input_dims, step_dims
from pipeload.cli import app
from pipeload.cli.commands import bench as command
from pipeload.errors import ConfigError
from pipeload.format.manifest import read

# Limits


def _block_devices(folder: Path, device: int, *, partition: bool) -> Path:
    """A copy of /sys/dev/block with one device, as a partition of disk 8:0 or as a disk."""
    disk = folder / "devices" / "sda"
    part = disk / "sda3"
    part.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    number = f"{os.major(device)}:{os.minor(device)}"
    (part / "dev").write_text(number)
    if partition:
        (part / "partition").write_text("3\n")
    system = folder / "block"
    system.mkdir()
    (system / number).symlink_to(part)
    return system


def test_a_partition_is_throttled_through_its_disk(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    assert cgroup.disk_number(tmp_path, _block_devices(tmp_path, device, partition=True)) == "8:0"


def test_a_disk_is_itself(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    assert cgroup.disk_number(tmp_path, _block_devices(tmp_path, device, partition=False)) == number


def test_a_file_system_without_a_disk_has_no_number(tmp_path: Path) -> None:
    assert cgroup.disk_number(tmp_path, tmp_path / "no-such-folder") is None


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("254:0 Read 50388992\n254:0 Write 7\n254:0 Total 50388999\n8:0 Read 8\nTotal 50389007\n", 50389000),
        ("254:0 rbytes=1459200 wbytes=314773504 rios=192 wios=353\n8:0 rbytes=1 wbytes=0\n", 1459201),
        ("", 0),
    ],
    ids=["v1", "v2", "nothing was read"],
)
def test_bytes_are_counted_in_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, nbytes: int
) -> None:
    (tmp_path / "counter").write_text(text)
    monkeypatch.setenv(cgroup.READ_COUNTER, str(tmp_path / "counter"))
    assert cgroup.read_bytes() == nbytes


def test_without_a_cgroup_the_process_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cgroup.READ_COUNTER, raising=False)
    assert cgroup.read_bytes() >= 0


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a group of cgroups v2, in which every new group is."""
    folder = tmp_path / "group"
    folder.mkdir()
    for name, text in (
        ("memory.max", "max"),
        ("memory.swap.max", "max"),
        ("memory.peak", "4096\n"),
        ("memory.current", "2048\n"),
        ("memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n"),
        ("io.stat", "8:0 rbytes=77 wbytes=0\n"),
        ("io.max", ""),
        ("cgroup.procs", ""),
    ):
        (folder / name).write_text(text)

    @contextmanager
    def group(parent: Path) -> Iterator[Path]:
        assert parent == tmp_path
        yield folder

    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "_group", group)
    monkeypatch.setattr(cgroup, "disk_number", lambda _: "8:0")
    return folder


def test_the_second_version_has_one_group_for_memory_and_disk(unified: Path, tmp_path: Path) -> None:
    code = "import os; from pipeload.bench import cgroup; print(os.getpid(), cgroup.read_bytes())"
    outcome = cgroup.run(
        [sys.executable, "-c", code],
        memory_bytes=5_000_000,
        read_bytes_per_s=400,
        disk_of=tmp_path,
        timeout_s=60,
        env=os.environ | {"PYTHONPATH": str(Path(cgroup.__file__).parents[2])},
    )
    assert outcome.returncode == 0, outcome.stderr
    pid, nbytes = outcome.stdout.split()
    assert (unified / "cgroup.procs").read_text().split() == [pid], "the child itself, not a shell that waits for it"
    assert nbytes == "77"
    assert (unified / "memory.max").read_text() == "5000000"
    assert (unified / "memory.swap.max").read_text() == "0"
    assert (unified / "io.max").read_text() == "8:0 rbps=400"
    assert (outcome.peak_bytes, outcome.oom_kills) == (4096, 1)
    assert all(used == 2048 for _, used in outcome.samples)


def test_the_second_version_without_controllers_says_which(unified: Path, tmp_path: Path) -> None:
    (unified / "io.stat").unlink()
    with pytest.raises(ConfigError, match=r"\+io into .*subtree_control"):
        cgroup.run(["true"], read_bytes_per_s=400, disk_of=tmp_path, timeout_s=60)
    (unified / "memory.max").unlink()
    assert "+memory" in (cgroup.permitted() or "")


def test_a_disk_that_is_none_cannot_be_throttled(
    unified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "disk_number", lambda _: None)
    with pytest.raises(ConfigError, match="not lie on a disk"):
        cgroup.run(["true"], read_bytes_per_s=400, disk_of=tmp_path, timeout_s=60)
    assert cgroup.run(["true"], disk_of=tmp_path, timeout_s=60).returncode == 0


def test_a_child_that_takes_too_long_is_ended() -> None:
    child = [sys.executable, "-c", "import signal; signal.pause()"]
    with pytest.raises(cgroup.subprocess.TimeoutExpired):
        cgroup.run(child, grouped=False, timeout_s=0.2)


# Arguments


@pytest.mark.parametrize(
    ("text", "nbytes"), [("25%", 1_000), ("12.5%", 500), ("512MB", 512_000_000), ("none", None), ("None", None)]
)
def test_budgets_are_sizes_or_percents_of_the_weights(text: str, nbytes: int | None) -> None:
    assert command._budget(text, SimpleNamespace(weight_bytes=4_000)) == nbytes


@pytest.mark.parametrize(("text", "rate"), [("400MB/s", 400_000_000), ("1 GiB/s", 1 << 30), ("none", None)])
def test_rates_have_a_unit_per_second(text: str, rate: int | None) -> None:
    assert command._rate(text) == rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--contenders", "pipeload,llama.cpp"),
            "There is no contender llama.cpp. The known ones are pipeload, single",
        ),
        (("--contenders", ","), "--contenders is empty"),
        (("--disk", "400"), "'400' is no rate for --disk. Write it with its unit and /s, such as 400MB/s"),
        (("--disk", "400/s"), "such as 400MB/s"),
        (("--disk", "fast/s"), "'fast/s' is no rate"),
        (("--budgets", "many"), "percents of the weights"),
        (("--budgets", "0%"), "must be positive"),
        (("--budgets", ","), "--budgets is empty"),
        (("--size", "sequence_length"), "--size as NAME=VALUE"),
        (("--size", "colour=3"), "has no dimension ['colour']"),
        (("--onnx", "missing.onnx"), "There is no file missing.onnx"),
        (("--passes", "0"), "--passes"),
        (("-o", "missing/out.json"), "cannot be written"),
    ],
)
def test_bad_arguments_are_named(toy: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(toy), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_help_has_examples() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    assert "pipeload bench models/" in result.stdout


# Records


def test_a_spec_survives_its_journey() -> None:
    spec = Spec(
        contender="mmap",
        directory=Path("/models/a"),
        unsplit=Unsplit(graph=Path("/g.onnx"), folder=Path("/models/a")),
        sizes={"batch": 2},
        texts=("a", "b"),
    )
    assert from_json(to_json(spec), Spec) == spec


def test_a_record_has_medians_and_what_the_plan_said() -> None:
    plan = PlanFacts(
        budget_bytes=100,
        peak_bytes=90,
        first_s=5.0,
        steady_s=1.5,
        resident_bytes=40,
        loaders=2,
        buffers=3,
        threads=2,
        packed=False,
    )
    runs = [
        Run(
            result=Result(first_s=first, passes_s=passes, read_bytes=7, peak_rss_bytes=80, plan=plan),
            peak_bytes=peak,
            error=1e-6,
        )
        for first, passes, peak in ((4.0, (2.0, 9.0), 70), (8.0, (2.0, 2.5), 75), (5.0, (3.0, 2.0), 60))
    ]
    record = summarise("m", Job(contender="pipeload", budget_bytes=100, disk_bytes_per_s=None), runs, BOUNDS)
    assert (record.first_s, record.steady_s, record.peak_bytes) == (5.0, 2.25, 75)
    assert (record.efficiency, record.first_efficiency) == (1.0 / 2.25, 2.0 / 5.0)
    assert (record.predicted_first_s, record.predicted_steady_s, record.predicted_peak_bytes) == (5.0, 1.5, 90)
    assert record.resident_bytes == 40
    assert record.ok


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(result=None, killed=True, message="The kernel killed it."), "The kernel killed it."),
        (Run(result=Result(error="A budget of 3 B cannot work.")), "A budget of 3 B cannot work."),
    ],
)
def test_one_failed_run_fails_the_record(run: Run, message: str) -> None:
    job = Job(contender="mmap", budget_bytes=1, disk_bytes_per_s=None)
    record = summarise("m", job, [run_of(), run], BOUNDS)
    assert not record.ok
    assert record.message == message
    assert record.killed == run.killed
    assert (record.first_s, record.steady_s, record.passes_s, record.efficiency) == (None, None, (), None)


def test_an_answer_that_was_not_checked_is_not_ok() -> None:
    run = Run(result=Result(first_s=1.0, passes_s=(1.0,)), error=None)
    assert not summarise("m", Job(contender="mmap", budget_bytes=1, disk_bytes_per_s=None), [run], None).ok


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"y": np.array([0.0, 2.0]), "ids": np.array([1, 2])}, 0.0),
        ({"y": np.array([0.0, 2.5]), "ids": np.array([1, 2])}, 0.25),
        ({"y": np.array([0.0, np.nan]), "ids": np.array([1, 2])}, float("inf")),
        ({"y": np.array([0.0, 2.0]), "ids": np.array([1, 3])}, float("inf")),
        ({"y": np.array([[0.0, 2.0]]), "ids": np.array([1, 2])}, float("inf")),
        ({"y": np.array([0.0, 2.0])}, float("inf")),
    ],
    ids=["equal", "off", "nan", "other token", "other shape", "missing"],
)
def test_errors_are_parts_of_the_range(tmp_path: Path, found: dict[str, Any], error: float) -> None:
    np.savez(tmp_path / "wanted.npz", y=np.array([0.0, 2.0]), ids=np.array([1, 2]))
    np.savez(tmp_path / "found.npz", **found)
    assert max_error(tmp_path / "wanted.npz", tmp_path / "found.npz") == error


def test_a_decoder_begins_with_a_prompt_and_goes_on_with_one_token(toy_decoder: Path) -> None:
    manifest = read(toy_decoder)
    first = input_dims(manifest, toy_decoder, {})
    later = step_dims(manifest, first)
    (new,) = {name for name in first if first[name] == 16}
    assert later[new] == 1
    assert 16 in later.values(), "the prompt is in the caches"


def test_an_encoder_does_the_same_in_every_pass(toy: Path) -> None:
    dims = input_dims(read(toy), toy, {})
    assert step_dims(read(toy), dims) == dims


# Tables


def test_a_table_leaves_out_what_is_the_same_everywhere() -> None:
    records = [record_of(), record_of("mmap", seconds=None), record_of("single", budget=None)]
    screen = io.StringIO()
    Console(width=160, file=screen).print(table(records))
    text = screen.getvalue()
    assert "budget" in text
    assert "1.00 GB" in text
    assert "disk" not in text
    assert "killed" in text
    page = markdown(records).splitlines()
    assert page[0].startswith("| contender | budget | first | steady | T* |")
    assert len({line.count("|") for line in page}) == 1
    assert "| 4.00 s | 2.00 s | 1.00 s | 0.50 | 5.0 MB |" in page[2]
