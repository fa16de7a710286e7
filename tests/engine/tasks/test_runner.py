from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import PATIENCE_S
from tests.engine.tasks.fakes import ToyRunner, manifest

from pipeload.errors import ConfigError
from pipeload.tasks.runner import Runner, graph_inputs, once_per_runner


def _runner(dtype: str = "int64") -> ToyRunner:
    return ToyRunner(Path("/nowhere"), manifest("fill-mask", ("input_ids",), dtype=dtype, cached=True), dict)


def test_caches_are_no_free_inputs() -> None:
    assert [spec.name for spec in _runner().manifest.free_inputs] == ["input_ids"]


def test_inputs_are_chosen_and_cast_as_the_graph_wants_them() -> None:
    ids = np.array([[1]])
    arrays = graph_inputs(_runner("int32"), {"input_ids": ids, "attention_mask": ids})
    assert {name: array.dtype for name, array in arrays.items()} == {"input_ids": np.int32}
    assert graph_inputs(_runner(), {"input_ids": ids})["input_ids"] is ids


def test_an_input_that_the_task_cannot_make_is_named() -> None:
    with pytest.raises(ConfigError, match=r"takes 'input_ids', and this call makes only 'pixel_values'"):
        graph_inputs(_runner(), {"pixel_values": np.zeros(1)})


def test_what_is_made_for_a_runner_is_kept_as_long_as_the_runner() -> None:
    made: list[Runner] = []

    @once_per_runner
    def make(runner: Runner) -> object:
        made.append(runner)
        return object()

    runner, other = _runner(), _runner()
    first = make(runner)
    assert make(runner) is first
    assert make(other) is not first
    made.clear()
    del runner
    gc.collect()
    assert make(other) is not None
    assert made == []


def test_two_threads_do_not_make_it_twice() -> None:
    gate = threading.Barrier(2)
    made: list[int] = []

    @once_per_runner
    def make(runner: Runner) -> int:
        made.append(1)
        return len(made)

    runner = _runner()
    results: list[int] = []

    def work() -> None:
        gate.wait(PATIENCE_S)
        results.append(make(runner))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == [1, 1]


def test_what_failed_is_tried_again() -> None:
    answers = iter([ConfigError("no"), "yes"])

    @once_per_runner
    def make(runner: Runner) -> str:
        answer = next(answers)
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    runner = _runner()
    with pytest.raises(ConfigError):
        make(runner)
    assert make(runner) == "yes"
