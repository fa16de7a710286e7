"""`benchmarks.generation` on tiny models: programs run in processes of their own, and wrong answers are seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models import made_once

from pipeload.bench import cgroup

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from benchmarks.generation import bits, rivals
from benchmarks.generation.limited import Done, files_of, run_program

pytestmark = pytest.mark.timeout(120, func_only=True)
needs_cgroups = pytest.mark.skipif(cgroup.permitted() is not None, reason=str(cgroup.permitted()))

REFERENCE: dict[str, Any] = {"token_ids": [7, 8, 9], "logprobs": [-1.0, -2.0, -3.0], "weight_bytes": 1_000}


def _answer(**changes: Any) -> Done:
    told = {"library": "some 1.0", "seconds": [9.0, 5.0, 1.0], "read_bytes": [900, 500, 100]}
    return Done(answer=REFERENCE | told | changes, peak_bytes=2_000)


def _record(name: str, done: Done) -> rivals.Record:
    return rivals.summarise(name, 10**9, done, REFERENCE, settling=1, disk_bytes_per_s=400)


@pytest.fixture(scope="module")
def model() -> Path:
    return made_once("gpt2") / "gpt2"


def test_only_tokens_after_the_settling_ones_count() -> None:
    record = _record("pipeload", _answer(resident_bytes=600))
    assert record.ok
    assert (record.first_s, record.settling_s, record.tokens_s, record.token_s) == (9.0, (5.0,), (1.0,), 1.0)
    assert record.read_bytes == 100
    assert record.bound_s == 1.0


@pytest.mark.parametrize("changes", [{"token_ids": [7, 8, 1]}, {"logprobs": [-1.0, -2.0, -3.1]}])
def test_a_wrong_answer_fails_the_report(changes: dict[str, Any]) -> None:
    records = (_record("pipeload", _answer(resident_bytes=600)), _record("airllm", _answer(**changes)))
    report = rivals.Report(machine={}, weight_bytes=1_000, disk_bytes_per_s=400, settling=1, records=records)
    assert not report.ok
    assert "wrong (1.00 s)" in rivals.rows(report)


def test_who_is_killed_is_no_failure_unless_it_is_pipeload() -> None:
    killed = Done(answer=None, peak_bytes=10**9, killed=True, message="The kernel killed it for memory.")
    ours, theirs = _record("pipeload", _answer(resident_bytes=600)), _record("llama.cpp", killed)
    report = rivals.Report(machine={}, weight_bytes=1_000, disk_bytes_per_s=400, settling=1, records=(ours, theirs))
    assert report.ok
    assert "| llama.cpp | killed |" in rivals.rows(report)
    refused = _record("pipeload", Done(answer={"refused": "the smallest that can is 2 GB"}))
    assert not rivals.Report(machine={}, weight_bytes=1_000, disk_bytes_per_s=400, settling=1, records=(refused,)).ok


def _bits(name: str, cap: int | None, done: Done, *, right: bool = True) -> bits.Record:
    model = bits.Model(name="toy int4", paths={}, percents=())
    return replace(bits.summarise(model, name, cap, 1_000, done, settling=1), ok=right and done.answer is not None)


def test_weights_of_few_bits_are_held_against_the_answer_without_a_cap() -> None:
    killed = Done(answer=None, peak_bytes=500, killed=True, message="The kernel killed it for memory.")
    fast, slow = _answer(again_s=1.0), _answer(again_s=2.0, seconds=[9.0, 5.0, 3.0])

    def report(*records: bits.Record) -> bits.Report:
        return bits.Report(machine={}, disk_bytes_per_s=400, settling=1, records=records)

    both = report(_bits("pipeload", None, fast), _bits("llama.cpp", None, slow))
    assert both.ok
    assert "| toy int4 | none | pipeload | 1.0 kB | 1.00 s | 3.00 | 64 | 100 B |" in bits.rows(both)
    theirs = report(_bits("pipeload", 500, fast), _bits("llama.cpp", 500, killed))
    assert theirs.ok
    assert "| toy int4 | 500 B | llama.cpp | 1.0 kB | killed |" in bits.rows(theirs)
    assert not report(_bits("pipeload", 500, killed), _bits("llama.cpp", 500, slow)).ok
    assert not report(_bits("pipeload", 500, fast, right=False), _bits("llama.cpp", 500, slow)).ok


@pytest.mark.slow
@pytest.mark.cgroup
@needs_cgroups
def test_tokens_are_those_of_one_call(model: Path) -> None:
    order = {"model": str(model), "prompt": [1, 2, 3], "tokens": 4, "threads": 1}
    done = run_program("pipeload_tokens", order, files=files_of(model), memory_bytes=400_000_000)
    assert done.answer is not None, done.message
    import pipeload

    with pipeload.load(model) as opened:
        made = opened.generate([1, 2, 3], max_new_tokens=4, do_sample=False, eos_token_id=[], logprobs=True)
    assert done.answer["token_ids"] == list(made.token_ids)
    assert done.answer["logprobs"] == pytest.approx(made.logprobs, abs=1e-4)
    assert len(done.answer["seconds"]) == len(done.answer["read_bytes"]) == 4
    assert done.answer["again_s"] is None


@pytest.mark.cgroup
@needs_cgroups
def test_a_program_that_fails_leaves_its_last_words(model: Path) -> None:
    done = run_program("pipeload_tokens", {"model": "nowhere"}, files=[])
    assert done.answer is None
    assert "Order" in (done.message or "")
