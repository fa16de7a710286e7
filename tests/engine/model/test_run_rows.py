"""Rows of texts of several callers in one batch: each caller gets its own, as alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import PATIENCE_S, Background, Gate, assert_same, run_sequentially, smallest_budget
from tests.engine.model.loading import PLENTY, THREADS, load

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard, TensorSpec
from pipeload.pipeline import joining
from pipeload.pipeline.callers import Caller
from pipeload.pipeline.joining import Joins, Padding
from pipeload.pipeline.session import ShardSession
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.storage.weights import Storage

RIGHT = Padding(fills=(("input_ids", 0), ("attention_mask", 0)), left=False)
LEFT = Padding(fills=RIGHT.fills, left=True)


class Passes:
    """The shapes of the feeds of each sweep; the first one stops at a gate, and so does another one that is chosen."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[int, ...]]] = []
        self.gates = {1: Gate()}

    def begin(self, feeds: list[Feed]) -> None:
        self.shapes.append([tuple(feed.pieces[0]["input_ids"].shape()) for feed in feeds])
        if (gate := self.gates.get(len(self.shapes))) is not None:
            gate.stop_here()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    made, run = Passes(), Sweep.run

    def counted(self: Sweep, feeds: Any, *arguments: Any, **options: Any) -> None:
        # Not the reference's.
        if threading.current_thread().name == "pipeload-inference":
            made.begin(feeds)
        run(self, feeds, *arguments, **options)

    monkeypatch.setattr(Sweep, "run", counted)
    yield made
    for gate in made.gates.values():
        gate.open()


def texts(count: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Rows as a tokenizer makes them, without any padding."""
    made = toys.inputs(count, length, seed)
    return {**made, "attention_mask": np.ones_like(made["attention_mask"])}


def waiting(model: pipeload.Model, calls: list[Callable[[], Any]]) -> list[Background]:
    """Callers whose calls wait in the queue, in this order."""
    queue, callers = model._pipeline._exchange.calls, []
    for call in calls:
        before = len(queue._waiting)
        callers.append(Background(call))
        with queue._changed:
            assert queue._changed.wait_for(lambda: len(queue._waiting) > before, PATIENCE_S)  # noqa: B023
    return callers


def together(
    model: pipeload.Model, passes: Passes, cases: list[Mapping[str, Any]], padding: Padding = RIGHT
) -> list[Background]:
    """Callers of these rows, who wait while a first pass runs; it has ended when this returns."""
    first = Background(model.run_rows, texts(1, 3), padding)
    passes.gates[1].wait_reached()
    callers = waiting(model, [lambda case=case: model.run_rows(case, padding) for case in cases])  # type: ignore[misc]
    passes.gates[1].open()
    first.end()
    return callers


def expected(directory: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    return run_sequentially(directory, case, threads=THREADS)


@pytest.mark.parametrize("budget", ["resident", "streamed"])
@pytest.mark.parametrize("padding", [RIGHT, LEFT])
def test_callers_who_wait_share_a_batch_and_get_their_own_rows(
    toy: Path, passes: Passes, budget: str, padding: Padding
) -> None:
    cases = [texts(1, 6, 1), texts(2, 5, 2), texts(1, 6, 3)]
    with load(toy, PLENTY if budget == "resident" else smallest_budget(toy)) as model:
        callers = together(model, passes, cases, padding)
        for caller, case in zip(callers, cases, strict=True):
            assert_same(caller.end(), expected(toy, case))
        assert passes.shapes == [[(1, 3)], [(4, 6)]]
        assert bool(model.plan.streamed_bytes) == (budget == "streamed")


def test_texts_of_like_length_are_together(toy: Path, passes: Passes) -> None:
    """Padding would compute more than the texts."""
    cases = [texts(1, length) for length in (6, 40, 5, 38, 6)]
    with load(toy) as model:
        callers = together(model, passes, cases)
        for caller, case in zip(callers, cases, strict=True):
            assert_same(caller.end(), expected(toy, case))
    assert passes.shapes == [[(1, 3)], [(3, 6)], [(2, 40)]]


def test_a_batch_has_no_more_tokens_than_the_limit(toy: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "MOST_TOKENS", 20)
    cases = [texts(1, 6, seed) for seed in range(5)] + [texts(5, 6)]
    with load(toy) as model:
        callers = together(model, passes, cases)
        for caller, case in zip(callers, cases, strict=True):
            assert_same(caller.end(), expected(toy, case))
    # One caller's rows stay together.
    assert passes.shapes == [[(1, 3)], [(3, 6)], [(2, 6)], [(5, 6)]]


def test_no_weights_leave_memory_for_a_batch(toy: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget without room beside the plan, calls run one by one that would need more than it has."""
    cases = [texts(1, 100, 1), texts(1, 100, 2)]
    with load(toy) as model:
        pass_needs = model._pass_needs
        least = pass_needs((("batch_size", 1), ("sequence_length", 100)), None, False)[0]
        room = model.plan.budget_bytes - model.plan.peak_bytes + model.plan.pass_bytes
        monkeypatch.setattr(
            model,
            "_pass_needs",
            lambda sizes, *_: (least, 0) if dict(sizes)["batch_size"] == 1 else (room + 1, 0),
        )
        for caller in together(model, passes, cases):
            caller.end()
    assert passes.shapes == [[(1, 3)], [(1, 100)], [(1, 100)]]


def test_other_passes_share_no_batch(toy: Path, passes: Passes) -> None:
    with load(toy) as model:
        first = Background(model.run_rows, texts(1, 3), RIGHT)
        passes.gates[1].wait_reached()
        case = texts(1, 6)
        calls = [lambda: model.run_rows(case, RIGHT), lambda: model.run(case), lambda: model.run_rows(case, LEFT)]
        callers = waiting(model, calls)
        passes.gates[1].open()
        for caller in [first, *callers]:
            caller.end()
    assert passes.shapes == [[(1, 3)], [(1, 6)], [(1, 6)], [(1, 6)]]


def test_a_caller_who_leaves_while_waiting_is_not_in_the_batch(toy: Path, passes: Passes) -> None:
    leaving, cases = Caller(), [texts(1, 6, 1), texts(1, 6, 2)]

    def leave() -> Any:
        with leaving:
            return model.run_rows(texts(1, 6), RIGHT)

    with load(toy) as model:
        first = Background(model.run_rows, texts(1, 3), RIGHT)
        passes.gates[1].wait_reached()
        gone, *callers = waiting(
            model,
            [leave, lambda: model.run_rows(cases[0], RIGHT), lambda: model.run_rows(cases[1], RIGHT)],
        )
        leaving.leave()
        assert isinstance(gone.wait(), pipeload.ClosedError)
        passes.gates[1].open()
        first.end()
        for caller, case in zip(callers, cases, strict=True):
            assert_same(caller.end(), expected(toy, case))
    assert passes.shapes == [[(1, 3)], [(2, 6)]]


def test_a_caller_who_leaves_while_the_batch_runs_changes_nothing_for_others(toy: Path, passes: Passes) -> None:
    leaving, case = Caller(), texts(1, 6, 1)
    passes.gates[2] = Gate()

    def leave() -> Any:
        with leaving:
            return model.run_rows(texts(1, 6), RIGHT)

    with load(toy) as model:
        first = Background(model.run_rows, texts(1, 3), RIGHT)
        passes.gates[1].wait_reached()
        gone, caller = waiting(model, [leave, lambda: model.run_rows(case, RIGHT)])
        passes.gates[1].open()
        passes.gates[2].wait_reached()
        leaving.leave()
        assert isinstance(gone.wait(), pipeload.ClosedError)
        passes.gates[2].open()
        first.end()
        assert_same(caller.end(), expected(toy, case))
    assert passes.shapes == [[(1, 3)], [(2, 6)]]


def test_a_batch_ends_when_all_of_its_callers_have_left(toy: Path, passes: Passes) -> None:
    leaving = [Caller(), Caller()]
    passes.gates[2] = Gate()

    def leave(caller: Caller) -> Any:
        with caller:
            return model.run_rows(texts(1, 6), RIGHT)

    with load(toy) as model:
        first = Background(model.run_rows, texts(1, 3), RIGHT)
        passes.gates[1].wait_reached()
        callers = waiting(model, [lambda: leave(leaving[0]), lambda: leave(leaving[1])])
        passes.gates[1].open()
        passes.gates[2].wait_reached()
        for one in leaving:
            one.leave()
        for caller in callers:
            assert isinstance(caller.wait(), pipeload.ClosedError)
        passes.gates[2].open()
        first.end()
        model.run(texts(1, 2))
        # The batch came to no shard, so it was no pass.
        assert model.stats.passes == 2


@pytest.mark.parametrize("budget", ["resident", "streamed"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_rows_that_fail_fail_their_own_call_only(toy: Path, passes: Passes, budget: str, place: int) -> None:
    cases = [texts(1, 6, seed) for seed in range(3)]
    cases[place]["input_ids"][0, 2] = toys.VOCABULARY + 5
    with load(toy, PLENTY if budget == "resident" else smallest_budget(toy)) as model:
        callers = together(model, passes, cases)
        for index, (caller, case) in enumerate(zip(callers, cases, strict=True)):
            if index == place:
                assert "out of range" in str(caller.wait())
            else:
                assert_same(caller.end(), expected(toy, case))
        assert passes.shapes[1] == [(3, 6)]
        assert_same(model.run(texts(1, 6)), expected(toy, texts(1, 6)))


def test_a_process_without_memory_for_the_parts_of_a_batch_tells_each_of_its_callers(
    toy: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on: it has memory for the next pass."""
    cut, armed = joining.to_value, []

    def fails(*arguments: Any) -> Any:
        # Joining the rows uses it too.
        if armed and len(passes.shapes) == 2:
            raise MemoryError("Unable to allocate 9 GB")
        return cut(*arguments)

    monkeypatch.setattr(joining, "to_value", fails)
    with load(toy) as model:
        run = ShardSession.run
        monkeypatch.setattr(
            ShardSession, "run", lambda *arguments: (armed.append(len(passes.shapes) == 2), run(*arguments))[1]
        )
        for caller in together(model, passes, [texts(1, 6), texts(1, 6, 1)]):
            error = caller.wait()
            assert isinstance(error, pipeload.RunError)
            assert "The outputs of joined rows could not be cut apart: " in str(error)
            assert isinstance(error.__cause__, MemoryError)
        assert_same(model.run(texts(1, 6)), expected(toy, texts(1, 6)))


def test_rows_that_failed_together_run_again_after_a_sweep_that_a_read_has_ended(
    toy: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read's error is that of the call beside them, which had not failed."""
    run, read, failed = ShardSession.run, Storage.read_weights, []

    def fails(self: ShardSession, *arguments: Any) -> Any:
        if len(passes.shapes) == 2 and not failed:
            failed.append("rows")
            raise pipeload.RunError("The rows of both failed.")
        return run(self, *arguments)

    def fails_once(self: Storage, shard: Shard, *arguments: Any, **options: Any) -> bool:
        if shard.name == "epilogue" and failed == ["rows"]:
            failed.append("read")
            raise pipeload.LoadError("The disk failed.")
        return read(self, shard, *arguments, **options)

    monkeypatch.setattr(ShardSession, "run", fails)
    monkeypatch.setattr(Storage, "read_weights", fails_once)
    cases = [texts(1, 6), texts(1, 6, 1), texts(1, 40, 2)]
    with load(toy, smallest_budget(toy)) as model:
        first, second, beside = together(model, passes, cases)
        assert "The disk failed." in str(beside.wait())
        assert passes.shapes[1] == [(2, 6), (1, 40)]
        assert_same(first.end(), expected(toy, cases[0]))
        assert_same(second.end(), expected(toy, cases[1]))
    assert failed == ["rows", "read"]


def test_a_close_ends_all_calls_of_a_batch(toy: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes) -> None:
    inside = Gate()
    with load(toy) as model:
        first = Background(model.run_rows, texts(1, 3), RIGHT)
        passes.gates[1].wait_reached()
        callers = waiting(model, [lambda: model.run_rows(texts(1, 6), RIGHT) for _ in range(3)])
        run = ShardSession.run

        def gated(self: ShardSession, *arguments: Any) -> Any:
            if len(passes.shapes) == 2:
                inside.stop_here()
            return run(self, *arguments)

        monkeypatch.setattr(ShardSession, "run", gated)
        passes.gates[1].open()
        first.end()
        inside.wait_reached()
        closing = Background(model.close)
        exchange = model._pipeline._exchange
        with exchange._changed:
            assert exchange._changed.wait_for(lambda: exchange.closed, PATIENCE_S)
        inside.open()
        closing.end()
        for caller in callers:
            assert isinstance(caller.wait(), pipeload.ClosedError)


def test_only_models_of_texts_without_caches_share_batches(toy: Path, toy_decoder: Path) -> None:
    manifest = manifests.read(toy)
    assert Joins.of(manifest) == Joins(rows="batch_size", length="sequence_length", axes={"last_hidden_state": (1,)})
    assert Joins.of(manifests.read(toy_decoder)) is None
    (output,) = manifest.outputs
    for shape in (("sequence_length", 64), ("batch_size", "batch_size", 64), ("batch_size", "2 * sequence_length")):
        assert Joins.of(replace(manifest, outputs=(replace(output, shape=shape),))) is None
    for shape in ((2, "sequence_length"), ("batch_size", 128)):
        inputs = tuple(replace(spec, shape=shape) for spec in manifest.inputs)
        assert Joins.of(replace(manifest, inputs=inputs)) is None
    images = TensorSpec(name="pixel_values", dtype="float32", shape=("batch_size", 3, "height", "width"))
    assert Joins.of(replace(manifest, inputs=(images,))) is None
