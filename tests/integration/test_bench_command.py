"""`pipeload bench` on tiny models: every contender runs in its own process, and every answer is checked."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import made_once
from typer.testing import CliRunner, Result

from pipeload.bench import cgroup, harness
from pipeload.bench.harness import Report, Settings, compare
from pipeload.bench.launch import run_contender
from pipeload.bench.record import Record
from pipeload.bench.spec import CONTENDERS, Spec, Unsplit, from_json
from pipeload.cli import app

pytest.importorskip("onnx")
pytest.importorskip("transformers")

from pipeload_export.check.merge import merge

# Making the models may take longer, and has a limit of its own.
pytestmark = pytest.mark.timeout(120, func_only=True)
needs_cgroups = pytest.mark.skipif(cgroup.permitted() is not None, reason=str(cgroup.permitted()))


@pytest.fixture(scope="module")
def models() -> Path:
    return made_once("bert", "gpt2")


def _bench(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", str(directory), "--threads", "1", "--passes", "2", *arguments])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.cgroup
@needs_cgroups
@pytest.mark.slow
def test_every_contender_answers_right_under_a_limit(models: Path, tmp_path: Path, name: str) -> None:
    kept = tmp_path / "results.json"
    result = _bench(
        models / name, "--budgets", "400MB", "--contenders", ",".join(CONTENDERS), "--json", "-o", str(kept)
    )
    assert result.exit_code == 0, result.output
    records: list[dict[str, Any]] = json.loads(result.stdout)
    assert [r["contender"] for r in records] == ["single", *CONTENDERS], "single also runs without a limit"
    names = {field.name for field in fields(Record)}
    for record in records:
        assert record.keys() == names
        assert record["ok"], record
        assert record["max_error"] <= 1e-5
        assert record["model"] == name
        assert len(record["passes_s"]) == 2
        assert record["first_s"] > 0
        assert record["bound_s"] > 0
        assert record["efficiency"] == pytest.approx(record["bound_s"] / record["steady_s"])
        assert record["read_bytes"] >= 0
        assert record["peak_bytes"] <= (record["budget_bytes"] or 10**10)
    assert records[0]["budget_bytes"] is None
    report = from_json(kept.read_bytes(), Report)
    assert [record.contender for record in report.records] == [r["contender"] for r in records]
    assert report.machine["versions"]["onnxruntime"]
    assert any(run.samples for runs in report.runs for run in runs)


@pytest.mark.slow
@pytest.mark.cgroup
@needs_cgroups
def test_who_is_killed_and_who_refuses_have_records(models: Path) -> None:
    result = _bench(models / "bert", "--budgets", "16MB,40MB", "--contenders", "pipeload,mmap", "--json")
    assert result.exit_code == 0, result.output
    killed, _, refused, _ = json.loads(result.stdout)
    assert not killed["ok"]
    assert killed["killed"]
    assert killed["first_s"] is killed["steady_s"] is killed["max_error"] is None
    assert "kernel killed it" in killed["message"]
    assert refused["contender"] == "pipeload"
    assert not refused["ok"]
    assert refused["first_s"] is None
    assert refused["killed"] or "smallest that can" in refused["message"]


@pytest.mark.slow
def test_without_cgroups_it_says_so_and_measures_the_process(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "permitted", lambda: "not today")
    result = _bench(
        models / "bert", "--budgets", "300MB,400MB", "--disk", "400MB/s", "--contenders", "pipeload,mmap", "--json"
    )
    assert result.exit_code == 0, result.output
    assert "not today" in result.stderr
    records = json.loads(result.stdout)
    assert [(r["contender"], r["budget_bytes"]) for r in records] == [
        ("pipeload", 300_000_000),
        ("mmap", None),
        ("pipeload", 400_000_000),
    ]
    for record in records:
        assert record["ok"], record
        assert record["disk_bytes_per_s"] is None
        assert record["peak_bytes"] == record["peak_rss_bytes"] > 10_000_000


@pytest.mark.slow
def test_a_wrong_answer_is_not_ok(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is changed behind the harness's back, as if every contender computed something else."""
    monkeypatch.setattr(cgroup, "permitted", lambda: "not today")
    directory = models / "bert"
    run_reference = harness._Bench.run_reference

    def changed(bench: Any) -> None:
        run_reference(bench)
        with np.load(bench._reference) as outputs:
            arrays = {name: outputs[name] + 1e-3 * np.ptp(outputs[name]) for name in outputs.files}
        np.savez(bench._reference, **arrays)

    monkeypatch.setattr(harness._Bench, "run_reference", changed)
    unsplit = Unsplit(graph=merge(directory, tmp_path / "merged.onnx"), folder=directory)
    settings = Settings(
        directory=directory, unsplit=unsplit, contenders=("layerwise",), budgets=(None,), passes=1, threads=1
    )
    (record,) = compare(settings).records
    assert not record.ok
    assert record.max_error == pytest.approx(1e-3, rel=0.1)
    assert record.steady_s


def test_a_contender_that_fails_leaves_its_last_words(models: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    unsplit = Unsplit(graph=tmp_path / "broken.onnx", folder=tmp_path)
    spec = Spec(contender="single", directory=models / "bert", unsplit=unsplit, passes=1)
    run = run_contender(spec, grouped=False)
    assert run.result is None
    assert "broken.onnx" in (run.message or "")


def test_the_tasks_of_the_demo_run_for_any_engine(models: Path) -> None:
    spec = Spec(contender="layerwise", directory=models / "gpt2", task="generate", prompt=(1, 2, 3), passes=3)
    slow = run_contender(spec, grouped=False)
    ours = run_contender(replace(spec, contender="pipeload", budget="8GB"), grouped=False)
    assert slow.result is not None
    assert ours.result is not None
    assert slow.result.answer == ours.result.answer
    assert len(slow.result.answer) == 3
    assert ours.result.plan is not None
