"""Models that are loaded at the same time count one another: the budget is the whole process's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.engine.harness import Background, Gate
from tests.engine.model.loading import load, no_subprocess

from pipeload.measuring import profiler
from pipeload.pipeline.open_pipelines import OPEN_PIPELINES, _OpenPipelines
from pipeload.planning.profile import Profile


def test_of_two_models_that_are_loaded_at_once_the_second_counts_the_first(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, measured = Gate(), []

    def measure() -> Profile:
        measured.append(None)
        if len(measured) == 1:
            gate.stop_here()
        return Profile(process_bytes=10**8, cores=2)

    monkeypatch.setattr(profiler, "measure", measure)
    first = Background(lambda: load(toy_large))
    gate.wait_reached()
    second = Background(lambda: load(toy_large))
    # The second one waits before it measures: the memory that the first will keep is not known yet.
    assert OPEN_PIPELINES.lock.locked()
    assert len(measured) == 1
    gate.open()
    one, other = first.end(), second.end()
    try:
        weights = one.manifest.weight_bytes
        processes = sorted(model._replanner.profile.process_bytes for model in (one, other))
        assert processes[0] == 10**8
        assert processes[1] > 10**8
        assert one.plan.peak_bytes > weights
    finally:
        one.close()
        other.close()


def test_pipelines_may_be_dropped_while_they_are_counted() -> None:
    class Pipeline:
        to_come_bytes = 1

    known, kept = _OpenPipelines(), [Pipeline() for _ in range(3)]
    for pipeline in kept:
        known.add(pipeline)  # type: ignore[arg-type]
    assert known.to_come_bytes() == 3
    kept.pop()
    del pipeline
    assert known.to_come_bytes() == 2


@no_subprocess
def test_a_child_that_was_forked_while_a_model_is_loaded_can_load_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OPEN_PIPELINES.lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if not OPEN_PIPELINES.lock.locked() and OPEN_PIPELINES.to_come_bytes() == 0 else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
