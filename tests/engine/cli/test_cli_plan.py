"""`pipeload plan`: its output for a budget, and its answers when that budget cannot work."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.pipeline.rig import plan_by_hand
from typer.testing import CliRunner, Result

from pipeload.cli import app
from pipeload.errors import BudgetError, ConfigError
from pipeload.format import manifest as manifests
from pipeload.machine.memory import rss_bytes
from pipeload.machine.sizes import format_bytes
from pipeload.measuring import profile_store
from pipeload.planning.profile import Profile, ShardTimes

commands = importlib.import_module("pipeload.cli.commands.plan")

TIMES = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-4, packed_run_s=1e-4)
PACKED = replace(TIMES, run_s=1.0, loading_run_s=1.0)
"""Of weights that have to be packed to be fast."""


@pytest.fixture(autouse=True)
def fixed_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on the memory that other tests left occupied."""
    process = Profile(process_bytes=rss_bytes(), cores=2)
    monkeypatch.setattr("pipeload.cli.commands.plan.measure", lambda: process)


@pytest.fixture
def call(toy_large: Path, tmp_path: Path) -> Any:
    """Run the command with a made-up profile of the model with eight blocks."""

    def run(*arguments: object, times: ShardTimes = TIMES) -> Result:
        shards = {shard.name: times for shard in manifests.read(toy_large).shards}
        file = tmp_path / "profile.json"
        profile_store.write(Profile(process_bytes=1, cores=2, read_bytes_per_s={1: 1e9}, times={2: shards}), file)
        return CliRunner().invoke(app, ["plan", str(toy_large), f"--profile={file}", *map(str, arguments)])

    return run


def _smallest(call: Any, **options: Any) -> int:
    smallest: int = json.loads(call("--budget=8GB", "--json", **options).stdout)["smallest_budget_bytes"]
    return smallest


def _rows(text: str) -> dict[str, str]:
    """The table that follows the first line."""
    cells = [line.strip().split("  ", 1) for line in text.splitlines()[1:] if line.startswith("  ")]
    return {name: value.strip() for name, value in cells}


# What stays in memory


def test_all_of_a_model_in_memory_is_one_range(call: Any) -> None:
    rows = _rows(call("--budget=8GB").stdout)
    assert rows["resident"] == "10 of 10 shards: prologue, block.000-007, epilogue"
    assert rows["partly resident"] == "0 of 10"
    assert rows["read in each pass"] == "0 B"


def test_the_shards_that_stay_are_named(call: Any) -> None:
    budget = _smallest(call) + 15_000_000
    facts = json.loads(call(f"--budget={budget}", "--json").stdout)["plan"]
    resident = facts["resident"]
    assert len(resident) == facts["resident_shards"]
    assert 0 < len(resident) < facts["shards"]
    shown = _rows(call(f"--budget={budget}").stdout)["resident"]
    count, _, names = shown.partition(": ")
    assert count == f"{len(resident)} of {facts['shards']} shards"
    found = []
    for group in names.split(", "):
        stem, _, numbers = group.partition(".")
        for run in numbers.split():
            first, _, last = run.partition("-")
            found += [f"{stem}.{number:03d}" for number in range(int(first), int(last or first) + 1)]
        found += [] if numbers else [stem]
    assert found == resident


def test_what_is_packed_is_told_for_what_stays_and_for_what_is_read(call: Any) -> None:
    everything = _rows(call("--budget=8GB", times=PACKED).stdout)
    assert everything["stays in memory"].endswith(" MB, packed")
    budget = _smallest(call, times=PACKED) + 15_000_000
    result = call(f"--budget={budget}", "--sweep", times=PACKED)
    assert _rows(result.stdout.partition("\n\n")[0])["read in each pass"].endswith(" MB, then packed")
    assert ", then packed" in result.stdout.partition("\n\n")[2]
    facts = json.loads(call(f"--budget={budget}", "--json", times=PACKED).stdout)["plan"]
    assert facts["packed_streamed"]
    assert "packed" not in call(f"--budget={budget}").stdout


# A budget that cannot work


def test_cores_that_compute_and_read_are_told_only_where_one_is_little(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cores" not in _rows(call("--budget=8GB").stdout)
    process = Profile(process_bytes=rss_bytes(), cores=2, core_capacities={0: 1024, 1: 400, 2: 400, 3: 1024})
    monkeypatch.setattr("pipeload.cli.commands.plan.measure", lambda: process)
    assert _rows(call("--budget=8GB").stdout)["cores"] == "computing on 0, 3, reading on 1-2"
    assert json.loads(call("--budget=8GB", "--json").stdout)["plan"]["cores"] == "computing on 0, 3, reading on 1-2"


def test_a_budget_that_cannot_work_is_an_error_alone(call: Any) -> None:
    for arguments in (["--budget=2MB"], ["--budget=2MB", "--json"]):
        result = call(*arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, BudgetError)
        assert result.stdout == ""


def test_questions_about_other_budgets_are_answered_before_the_error(call: Any) -> None:
    smallest = _smallest(call)
    result = call("--budget=2MB", "--latency=10s", "--sweep")
    assert result.exit_code == 1
    assert isinstance(result.exception, BudgetError)
    assert "2.0 MB cannot work" in str(result.exception)
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        f"smallest budget that works: {format_bytes(smallest)}",
        f"smallest budget for 10s: {format_bytes(smallest)}",
        "",
    ]
    assert lines[3].split()[:2] == ["budget", "peak"]
    assert len(lines) == 4 + 11


def test_json_has_the_answers_and_no_plan(call: Any) -> None:
    smallest = _smallest(call)
    result = call("--budget=2MB", "--latency=10s", "--json")
    assert isinstance(result.exception, BudgetError)
    assert json.loads(result.stdout) == {
        "plan": None,
        "smallest_budget_bytes": smallest,
        "latency_budget_bytes": smallest,
        "sweep": [],
    }


def test_a_latency_that_no_budget_reaches_is_said(call: Any) -> None:
    result = call("--budget=8GB", "--latency=0.1ms")
    assert result.exit_code == 0
    assert "no budget makes steady passes of 0.1ms: with all in memory they take 1.0 ms" in result.stdout


# A profile that cannot be used


def test_a_profile_without_figures_is_named(toy_large: Path, tmp_path: Path) -> None:
    file = tmp_path / "empty.json"
    profile_store.write(Profile(process_bytes=1, cores=2), file)
    result = CliRunner().invoke(app, ["plan", str(toy_large), f"--profile={file}"])
    assert isinstance(result.exception, ConfigError)
    assert str(file) in str(result.exception)


def test_the_process_is_measured_with_the_tokenizer_that_commands_load(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    alive: list[object] = []
    monkeypatch.setattr("pipeload.cli.commands.plan.tokenizer_of", lambda model: alive.append(model.files) or object())
    process = Profile(process_bytes=rss_bytes(), cores=2)
    monkeypatch.setattr("pipeload.cli.commands.plan.measure", lambda: alive.append("measured") or process)
    assert call("--budget", "8GB").exit_code == 0
    assert len(alive) == 2
    assert alive[1] == "measured"


def test_shards_that_stay_in_16_bits_are_told_apart_from_those_that_are_read_in_part(
    made_toys: Callable[[str], Path],
) -> None:
    manifest = manifests.read(made_toys("toy-narrow"))
    half = manifest.shards[2].tensors[1].offset - manifest.shards[2].tensors[0].offset
    plan = plan_by_hand(manifest, partly={"block.000": (0, 0), "block.001": (0, half), "block.002": (0, 0)})
    plan = replace(plan, first_pass_s=1.0, steady_pass_s=1.0)
    profile = Profile(
        process_bytes=1,
        cores=2,
        read_bytes_per_s={1: 1e9},
        times={2: {shard.name: TIMES for shard in manifest.shards}},
    )
    facts = commands._facts(manifest, profile, plan)
    assert (facts["resident_16_bit_shards"], facts["partly_resident_shards"]) == (2, 1)
    assert commands._shown(manifest, facts)["resident in 16 bits"] == "2 of 8, widened for each pass"
    wide = commands._facts(manifest, profile, replace(plan, partly_resident={}))
    assert "resident in 16 bits" not in commands._shown(manifest, wide)


def test_inspect_says_how_weights_are_stored(made_toys: Callable[[str], Path]) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(made_toys("toy-narrow"))]).stdout
    assert "  weights        stored in bfloat16 and float16, used in float32\n" in shown
    assert "used in float32" not in CliRunner().invoke(app, ["inspect", str(made_toys("toy"))]).stdout
