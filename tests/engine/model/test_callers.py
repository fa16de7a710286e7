"""Several threads, models and hosts' own sessions in one process do not disturb each other."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    EMULATED,
    PATIENCE_S,
    Background,
    assert_same,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    THREADS,
    gated_reads,
    load,
)

from pipeload.format import manifest as manifests


def test_several_threads_get_their_own_answers(toy: Path) -> None:
    cases = [toys.inputs(1 + k % 3, 2 + k, seed=k) for k in range(6)]
    expected = [run_sequentially(toy, inputs, threads=THREADS) for inputs in cases]
    with load(toy, smallest_budget(toy) + 1_000_000) as model:
        barrier = threading.Barrier(len(cases))

        def call(k: int) -> None:
            barrier.wait(PATIENCE_S)
            for _ in range(8):
                assert_same(model.run(cases[k]), expected[k])

        for caller in [Background(call, k) for k in range(len(cases))]:
            caller.end()
        # One sweep serves all who wait.
        assert 8 <= model.stats.passes <= 8 * len(cases)


def test_two_models_work_beside_each_other(toy: Path, toy_decoder: Path) -> None:
    expected = [run_sequentially(path, toys.inputs(), threads=THREADS) for path in (toy, toy_decoder)]
    with load(toy, smallest_budget(toy)) as one, load(toy_decoder, smallest_budget(toy_decoder)) as two:

        def call(k: int) -> None:
            for _ in range(10):
                assert_same((one, two)[k].run(toys.inputs()), expected[k])

        callers = [Background(call, k % 2) for k in range(4)]
        for caller in callers:
            caller.end()
        one.close()
        assert_same(two.run(toys.inputs()), expected[1])


def test_one_directory_may_be_open_twice(toy: Path) -> None:
    with load(toy, smallest_budget(toy)) as one, load(toy, smallest_budget(toy)) as two:
        assert_same(one.run(toys.inputs()), two.run(toys.inputs()))


def test_the_hosts_own_sessions_go_on_working(toy: Path) -> None:
    manifest = manifests.read(toy)
    graph = str(toy / manifest.shards[-1].graph.path)
    hidden = {"hidden.6": np.ones((1, 2, 64), np.float32)}
    host = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    before = host.run(None, hidden)[0]
    with load(toy, smallest_budget(toy)) as model:
        calls = [Background(model.run, toys.inputs()) for _ in range(3)]
        np.testing.assert_array_equal(host.run(None, hidden)[0], before)
        # Made with all defaults, while the model runs: nothing process-wide was changed.
        again = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(again.run(None, hidden)[0], before)
        for call in calls:
            call.end()
    np.testing.assert_array_equal(host.run(None, hidden)[0], before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background of a shell ignores Ctrl-C: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(EMULATED, reason="signals do not interrupt waits reliably under qemu")
def test_an_interrupted_caller_is_free_at_once_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gated_reads(monkeypatch, "prologue")
    with load(toy, smallest_budget(toy)) as model:
        gate.wait_reached()
        waits, heard = threading.Event(), threading.Event()
        submit = model._pipeline._exchange.calls.submit
        monkeypatch.setattr(model._pipeline._exchange.calls, "submit", lambda call: (submit(call), waits.set())[0])

        def hear(number: int, frame: Any) -> None:
            if not heard.is_set():
                heard.set()
                signal.default_int_handler(number, frame)

        def interrupt() -> None:
            assert waits.wait(PATIENCE_S)
            # Again and again: CPython does not wake a wait by a signal that comes just before it.
            while not heard.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                heard.wait(0.1)

        before = signal.signal(signal.SIGINT, hear)
        interrupting = Background(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.run(toys.inputs())
            interrupting.end()
        finally:
            heard.set()
            signal.signal(signal.SIGINT, before)
        gate.open()
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
