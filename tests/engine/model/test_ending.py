"""A model that is closed, forgotten, collected or left open at the interpreter's end leaves nothing behind."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    Gate,
    agents,
    run_python,
    smallest_budget,
)
from tests.engine.model.loading import (
    THREADS,
    gated_reads,
    load,
    no_subprocess,
)
from tests.engine.tasks.fakes import write_bert_tokenizer
from tests.marks import slow

import pipeload
from pipeload.format import manifest as manifests
from pipeload.measuring import profile_store
from pipeload.planning import needs
from pipeload.storage.weights import Storage
from pipeload.tasks.text.tokenizer import tokenizer_of


def test_closing_during_a_call_ends_it(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated_reads(monkeypatch, "block.003")
    model = load(toy, smallest_budget(toy))
    calls = [Background(model.run, toys.inputs()) for _ in range(3)]
    gate.wait_reached()
    closing = Background(model.close)
    assert all(isinstance(call.wait(), pipeload.ClosedError) for call in calls)
    gate.open()
    closing.end()
    assert agents() == []


def test_a_closed_model_is_refused_everywhere(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        state = model.new_state()
    assert agents() == []
    model.close()
    for call in (
        lambda: model.run(toys.inputs()),
        lambda: model.step(toys.inputs(), state),
        model.new_state,
        model.__enter__,
    ):
        with pytest.raises(pipeload.ClosedError, match="The model is closed"):
            call()
    assert model.plan.threads == THREADS
    assert model.stats.passes == 0


def test_an_exception_in_the_block_closes_the_model(toy: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), load(toy):
        raise RuntimeError("mine")
    assert agents() == []


@pytest.mark.parametrize("moment", ["counted", "adopted"])
def test_a_load_that_is_interrupted_when_the_agents_run_leaves_none(
    toy: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    owner, name = {"counted": (pipeload.Budget, "add"), "adopted": (pipeload.Model, "_adopt")}[moment]
    budget = smallest_budget(toy)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            load(toy, budget)
    assert agents() == [], caught
    with load(toy, smallest_budget(toy)) as model:
        model.run(toys.inputs())


def test_several_may_close_at_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated_reads(monkeypatch, "prologue")
    model = load(toy, smallest_budget(toy))
    gate.wait_reached()

    def close() -> list[str]:
        model.close()
        return agents()

    closing = [Background(close) for _ in range(3)]
    while not model._pipeline._exchange.closed:
        model._pipeline._exchange.notify()
    gate.open()
    for call in closing:
        assert call.end() == [], "close returned before the threads had ended"


def test_a_forgotten_model_leaves_no_threads(toy: Path) -> None:
    model = load(toy, smallest_budget(toy))
    model.run(toys.inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert agents() == []


def test_a_forgotten_model_with_a_tokenizer_leaves_no_threads(toy_copy: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(toy_copy)
    model = load(toy_copy, smallest_budget(toy_copy))
    assert tokenizer_of(model) is tokenizer_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert agents() == []


def test_a_forgotten_model_in_a_cycle_leaves_no_threads(toy: Path) -> None:
    model: Any = load(toy, smallest_budget(toy))
    model.itself = model
    del model
    gc.collect()
    assert agents() == []


def test_a_model_that_an_agent_collects_leaves_no_threads(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = Gate(), Storage.read_weights

    def collect(self: Storage, *arguments: Any, **options: Any) -> bool:
        gate.stop_here()
        gc.collect()
        return real(self, *arguments, **options)

    monkeypatch.setattr(Storage, "read_weights", collect)
    gc.disable()
    try:
        model: Any = load(toy, smallest_budget(toy), loaders=1)
        model.itself = model
        threads = model._pipeline._threads
        gone = weakref.ref(model)
        gate.wait_reached()
        del model
        gate.open()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        gc.enable()
    assert gone() is None
    for thread in threading.enumerate():
        if thread.name == "pipeload-closer":
            thread.join(PATIENCE_S)
    assert agents() == []


@no_subprocess
@pytest.mark.parametrize(
    "end",
    [
        slow("pass"),
        "model.run(inputs)",
        "threading.Thread(target=go_on, daemon=True).start()",
        slow("model.itself = model; del model"),
        slow("sys.exit(0)"),
        "os.kill(os.getpid(), signal.SIGINT)",
        "raise ValueError('mine')",
    ],
)
def test_the_interpreter_ends_cleanly_without_close(toy: Path, end: str) -> None:
    program = f"""
import contextlib, os, signal, sys, threading
import pipeload
from pipeload.planning.replanner import Replanner
from tests.engine import toy
Replanner.learned = Replanner.profile
signal.signal(signal.SIGINT, signal.default_int_handler)
inputs = toy.inputs()
try:
    pipeload.load({str(toy)!r}, 1)
except pipeload.BudgetError as error:
    model = pipeload.load({str(toy)!r}, error.needed_bytes)
model.run(inputs)
def go_on():
    with contextlib.suppress(pipeload.ClosedError):
        while True:
            model.run(inputs)
{end}
"""
    expected = {"raise ValueError('mine')": 1, "os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT}.get(end, 0)
    done = run_python(program, exit_code=expected)
    if expected == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.strip().splitlines()[-1] in ("ValueError: mine", "KeyboardInterrupt")
    assert profile_store.find(toy, needs.planning_dims(manifests.read(toy))) is not None
