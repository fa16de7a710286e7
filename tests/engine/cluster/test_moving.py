"""A model moves between two passes: calls on their way end where they began, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.harness import PATIENCE_S, Background, Clock, Gate, agents

import pipeload
from pipeload.cluster.calls import Calls
from pipeload.cluster.loop import Loop
from pipeload.cluster.messages import NodeLostError
from pipeload.cluster.model import ClusterModel
from pipeload.format import manifest as manifests
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.profiler import profile_dims
from pipeload.pipeline import deadlines
from pipeload.planning.placement import Placement, Segment


class _Ring:
    """Stages that answer with their name, once they are let go on.

    Attributes:
        passes, opens: what is waited for before a pass ends, and before the stages are open.
        failures: of the next passes.
        failure: of opening them.
    """

    def __init__(self, name: str, told: list[str], *, gated: bool = False) -> None:
        self.name, self.told = name, told
        self.placement = Placement(segments=(Segment(node=name, begin=0, end=1, run_s=0.0, read_s=0.0, send_s=0.0),))
        self.members = [member(name, 400 * MB)]
        self.passes, self.opens = Gate(opened=not gated), Gate(opened=True)
        self.failures: list[pipeload.PipeloadError] = []
        self.failure: pipeload.PipeloadError | None = None
        self.reason: pipeload.PipeloadError | None = None
        self.steps: list[list[int]] = []

    async def bring(self) -> None:
        self.told.append(f"bringing {self.name}")

    async def start(self) -> None:
        self.told.append(f"opening {self.name}")
        await asyncio.to_thread(self.opens.stop_here)
        if self.failure:
            raise self.failure
        self.told.append(f"open {self.name}")

    async def run(self, _: object) -> dict[str, Any]:
        return {"answer": np.array([await self._passed()])}

    async def step(self, pieces: list[tuple[dict[str, Any], Any]]) -> str:
        self.steps.append([piece["input_ids"].shape[1] for piece, _ in pieces])
        return await self._passed()

    async def _passed(self) -> str:
        if self.reason:
            raise self.reason
        await asyncio.to_thread(self.passes.stop_here)
        if self.failures:
            raise self.failures.pop(0)
        return self.name

    def copying_s(self, *_: object) -> None:
        """No caches can be taken from other stages: texts begin anew."""

    async def settled(self) -> None:
        self.told.append(f"settled {self.name}")

    async def end_state(self, _: str) -> None:
        return None

    async def close(self, reason: pipeload.PipeloadError | None = None) -> None:
        if self.reason is None:
            self.reason = reason or pipeload.ClosedError("closed")
            self.told.append(f"closed {self.name}")

    def processes_at(self, address: str) -> frozenset[str]:
        return frozenset({self.name} if address else ())


class _Opened:
    """A model on fake rings.

    Attributes:
        told: events, in their order.
        rings: name -> each ring that was made.
    """

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.told: list[str] = []
        self.changes: list[dict[str, Any]] = []
        manifest = manifests.read(directory)
        self.inputs = example_inputs(manifest, profile_dims(manifest))
        self.old, self.new, self.third = (_Ring(name, self.told) for name in ("old", "new", "third"))
        first = [self.old, self.third]
        made: Any = ClusterModel(
            self.loop,
            "toy",
            directory,
            manifest,
            lambda _: first.pop(0),  # type: ignore[arg-type, return-value]
            lambda change: self.changes.append(dict(change)),
        )
        self.model: ClusterModel = made

    def run(self) -> str:
        return str(self.model.run(self.inputs)["answer"][0])

    def move(self, *, together: bool = True) -> bool:
        return self.model.rings.move(self.old, lambda _: self.new, "faster.", together=together)  # type: ignore[arg-type, return-value]


@pytest.fixture
def opened(toy: Path) -> Iterator[_Opened]:
    made = _Opened(toy)
    try:
        yield made
    finally:
        made.model.close()
        made.loop.close()
        assert agents() == []


def wait_for(opened: _Opened, holds: Callable[[Calls], object]) -> None:
    calls = opened.model.rings._calls
    with calls._changed:
        assert calls._changed.wait_for(lambda: holds(calls), PATIENCE_S)


def test_calls_on_their_way_end_where_they_began(opened: _Opened) -> None:
    opened.old.passes = Gate()
    on_its_way = Background(opened.run)
    opened.old.passes.wait_reached()
    opened.new.opens = Gate()
    move = Background(opened.move)
    opened.new.opens.wait_reached()
    assert opened.told == ["opening new"]
    # The target prefetches, and the stages before serve.
    opened.new.opens.open()
    wait_for(opened, lambda calls: calls.ring is opened.new)
    assert opened.run() == "new"
    assert "closed old" not in opened.told
    opened.old.passes.open()
    assert on_its_way.end() == "old"
    assert move.end()
    assert opened.told == ["opening new", "open new", "closed old", "settled new"]
    (change,) = opened.model.reconfigurations
    assert (change.before, change.after) == (opened.old.placement, opened.new.placement)
    assert (change.why, change.waited_s) == ("faster.", 0.0)
    assert opened.changes[0]["why"] == "faster."


def test_without_room_for_both_calls_wait_between_two_passes(opened: _Opened) -> None:
    opened.old.passes, opened.new.opens = Gate(), Gate()
    on_its_way = Background(opened.run)
    opened.old.passes.wait_reached()
    move = Background(lambda: opened.move(together=False))
    wait_for(opened, lambda calls: calls._shut)
    later = Background(opened.run)
    wait_for(opened, lambda calls: calls._waiting)
    # What has to be fetched is fetched before calls wait.
    assert opened.told == ["bringing new"]
    opened.old.passes.open()
    assert on_its_way.end() == "old"
    opened.new.opens.wait_reached()
    assert opened.told == ["bringing new", "closed old", "opening new"]
    assert later.is_alive()
    opened.new.opens.open()
    assert later.end() == "new"
    assert move.end()
    assert opened.model.reconfigurations[0].waited_s > 0


def test_a_list_of_passes_does_not_wait_for_itself(opened: _Opened) -> None:
    """Its passes on their way have ended, though their caller has not taken the answers yet."""
    wanted, told = Gate(), []

    def items() -> Iterator[dict[str, Any]]:
        yield opened.inputs
        wanted.stop_here()
        for _ in range(3):
            yield opened.inputs

    many = Background(lambda: told.extend(one["answer"][0] for one in opened.model.run_many(items())))
    wanted.wait_reached()
    assert opened.move(together=False)
    wanted.open()
    many.end()
    assert told == ["old", "new", "new", "new"]


@pytest.mark.parametrize("together", [True, False])
def test_a_move_that_fails_costs_no_answer(opened: _Opened, together: bool) -> None:
    opened.new.failure = pipeload.BudgetError("no room", needed_bytes=2, budget_bytes=1)
    assert not opened.move(together=together)
    assert "closed new" in opened.told
    (change,) = opened.model.reconfigurations
    assert change.after is None
    assert "no room" in change.why
    # The stages before were closed first only where both had no room; then the model is placed anew.
    assert opened.run() == ("old" if together else "third")
    assert opened.run() == ("old" if together else "third")


def test_a_call_that_has_no_room_beside_both_waits_for_the_end_of_the_move(opened: _Opened) -> None:
    error = pipeload.BudgetError("no room", needed_bytes=2, budget_bytes=1)
    opened.old.passes, opened.new.opens = Gate(), Gate()
    opened.old.failures = [error]
    call = Background(opened.run)
    opened.old.passes.wait_reached()
    move = Background(opened.move)
    opened.new.opens.wait_reached()
    opened.old.passes.open()
    wait_for(opened, lambda calls: calls._waiting)
    opened.new.opens.open()
    assert move.end()
    assert call.end() == "new"
    # Without a move it is the caller's error, and so it is the second time.
    opened.new.failures = [error]
    with pytest.raises(pipeload.BudgetError):
        opened.run()


def _refused_within(nbytes: int) -> pipeload.BudgetError:
    return pipeload.BudgetError("no room", needed_bytes=450 * MB, budget_bytes=nbytes)


def test_a_call_that_a_node_refuses_since_its_memory_is_short_waits_until_it_is_left(opened: _Opened) -> None:
    async def notice() -> None:
        await asyncio.to_thread(opened.move)

    opened.model.rings.notice = notice
    opened.old.failures = [_refused_within(100 * MB)]
    assert opened.run() == "new"


def test_a_call_that_the_whole_budget_has_no_room_for_waits_for_nothing(opened: _Opened) -> None:
    async def notice() -> None:
        raise AssertionError("no move would help")

    opened.model.rings.notice = notice
    opened.old.failures = [_refused_within(400 * MB)]
    with pytest.raises(pipeload.BudgetError):
        opened.run()


def test_a_call_waits_once_where_no_node_has_room(opened: _Opened) -> None:
    """Then its error is that of the model, which names the budget that works."""
    waits: list[None] = []

    async def notice() -> None:
        waits.append(None)

    opened.model.rings.notice = notice
    opened.old.failures = [_refused_within(100 * MB) for _ in range(2)]
    opened.model.rings.refuse(pipeload.ClusterError("the smallest budget of a node that works is 450 MB"))
    with pytest.raises(pipeload.ClusterError, match="smallest budget") as told:
        opened.run()
    assert isinstance(told.value.__cause__, pipeload.BudgetError)
    assert len(waits) == 1
    # Said once, however long it lasts.
    opened.model.rings.refuse(pipeload.ClusterError("the smallest budget of a node that works is 450 MB"))
    assert len(opened.model.reconfigurations) == 1
    opened.model.rings.refuse(None)
    assert opened.run() == "old"


def test_a_node_that_is_lost_while_the_model_moves_costs_no_answer(opened: _Opened) -> None:
    opened.old.passes, opened.new.opens = Gate(), Gate()
    opened.old.failures = [NodeLostError("The node old was lost.", "tcp://old")]
    call = Background(opened.run)
    opened.old.passes.wait_reached()
    move = Background(opened.move)
    opened.new.opens.wait_reached()
    opened.old.passes.open()
    opened.new.opens.open()
    assert move.end()
    assert call.end() == "new"
    assert opened.model.replacements == 0


def test_a_placement_that_is_not_the_present_one_any_more_is_not_left(opened: _Opened) -> None:
    opened.old.failures = [NodeLostError("The node old was lost.", "tcp://old")]
    assert opened.run() == "third"
    assert not opened.move()
    assert opened.run() == "third"
    (change,) = opened.model.reconfigurations
    assert "was lost" in change.why


@pytest.mark.parametrize("together", [True, False])
def test_closing_ends_a_move_and_the_calls_that_wait_for_it(opened: _Opened, together: bool) -> None:
    opened.new.opens = Gate()
    move = Background(lambda: opened.move(together=together))
    opened.new.opens.wait_reached()
    call = None if together else Background(opened.run)
    if call:
        wait_for(opened, lambda calls: calls._waiting)
    opened.model.close()
    opened.new.opens.open()
    assert not move.end()
    assert call is None or isinstance(call.wait(), pipeload.ClosedError)
    assert {"closed old", "closed new"} <= {*opened.told}
    with pytest.raises(pipeload.ClosedError):
        opened.run()


def test_closing_ends_a_move_that_waits_for_the_last_call(opened: _Opened) -> None:
    opened.old.passes = Gate()
    call = Background(opened.run)
    opened.old.passes.wait_reached()
    move = Background(opened.move)
    wait_for(opened, lambda calls: calls.ring is opened.new)
    opened.model.close()
    assert not move.end()
    assert {"closed old", "closed new"} <= {*opened.told}
    opened.old.passes.open()
    call.wait()


def test_a_model_that_is_dropped_while_it_moves_leaves_no_stages(opened: _Opened) -> None:
    """Nothing waits for the move then, so it closes what it has opened by itself."""
    opened.old.passes = Gate()
    call = Background(opened.run)
    opened.old.passes.wait_reached()
    move = Background(opened.move)
    wait_for(opened, lambda calls: calls.ring is opened.new)
    rings = opened.model.rings
    # The stages of that moment are closed with the model; here the closing of the others is lost.
    rings._calls.close()
    assert not move.end()
    assert {"closed old", "closed new"} <= {*opened.told}
    opened.old.passes.open()
    call.wait()


def test_waiting_for_room_is_no_try(opened: _Opened) -> None:
    """A node that is lost after that is replaced, as ever."""

    async def notice() -> None:
        await asyncio.to_thread(opened.move)

    opened.model.rings.notice = notice
    opened.old.failures = [_refused_within(100 * MB)]
    opened.new.failures = [NodeLostError("The node new was lost.", "tcp://new")]
    assert opened.run() == "third"
    assert opened.model.replacements == 1


def test_a_text_goes_on_from_its_tokens(toy_decoder: Path) -> None:
    """The first step after the move has all of them, later ones the new one alone."""
    opened = _Opened(toy_decoder)
    try:
        model = opened.model
        with model.new_state() as state:
            for number, new in enumerate((3, 1, 1, 1)):
                if number == 2:
                    assert opened.move()
                past = state.length
                offered = {
                    "input_ids": np.ones((1, new), np.int64),
                    "attention_mask": np.ones((1, past + new), np.int64),
                    "position_ids": np.arange(past, past + new)[None],
                }
                model.step({spec.name: offered[spec.name] for spec in model.inputs}, state)
            assert state.length == 6
        assert opened.old.steps == [[3], [1]]
        assert opened.new.steps == [[5], [1]]
    finally:
        opened.model.close()
        opened.loop.close()


def test_many_moves_and_many_calls_lose_no_call() -> None:
    rings: list[Any] = [object() for _ in range(3)]
    calls = Calls(rings[0])

    def call() -> None:
        for _ in range(200):
            while isinstance(ring := calls.enter(), Future):
                ring.result()
            calls.leave(ring)

    callers = [Background(call) for _ in range(4)]
    for number in range(1, 100):
        before = calls.ring
        calls.move()
        if number % 2:
            calls.shut()
            calls.ended(before)
            calls.to(rings[number % 3])
        else:
            calls.to(rings[number % 3])
            calls.ended(before)
        calls.rest()
    for caller in callers:
        caller.end()
    assert not calls._counts


def _late(opened: _Opened, when: str) -> None:
    with (
        pytest.raises(pipeload.DeadlineError, match=rf"The deadline of 0\.05 s passed {when}"),
        pipeload.deadline(0.05),
    ):
        opened.run()
    # It is not on its way any more: no move waits for it.
    wait_for(opened, lambda calls: not calls._counts)


def test_a_call_that_is_late_leaves_the_others(opened: _Opened) -> None:
    opened.old.passes = Gate()
    other = Background(opened.run)
    opened.old.passes.wait_reached()
    with pytest.raises(pipeload.DeadlineError, match="while a pass ran on old"), pipeload.deadline(0.05):
        opened.run()
    wait_for(opened, lambda calls: calls._counts[opened.old] == 1)
    opened.old.passes.open()
    assert other.end() == "old"
    assert opened.run() == "old"


def test_waiting_for_a_move_takes_time_of_a_deadline(opened: _Opened) -> None:
    opened.new.opens = Gate()
    move = Background(lambda: opened.move(together=False))
    opened.new.opens.wait_reached()
    _late(opened, "while the model moved to other stages")
    opened.new.opens.open()
    assert move.end()
    assert opened.run() == "new"


def test_waiting_for_a_thread_that_places_the_model_anew_takes_time_of_a_deadline(opened: _Opened) -> None:
    opened.old.failures = [NodeLostError("The node old was lost.", "tcp://old")]
    with opened.model.rings._placing:
        _late(opened, "while the model moved to other stages")
    assert opened.run() == "old"


def test_a_caller_that_is_late_leaves_a_lost_node_to_the_next_one(opened: _Opened) -> None:
    """Opening other stages takes time of its deadline; no stage stays half open, and the model is not lost with it."""
    rings, opening = opened.model.rings, opened.third
    opening.opens = Gate()

    def open_ring(_: object) -> Any:
        opened.loop.ask(opening.start())
        return opening

    rings._open_ring = open_ring
    opened.old.failures = [NodeLostError("The node old was lost.", "tcp://old") for _ in range(2)]
    _late(opened, "while the cluster was asked")
    opening.opens.open()
    assert opened.model.replacements == 0
    assert opened.run() == "third"
    assert opened.model.replacements == 1


def test_a_call_that_waits_for_a_node_with_little_memory_is_late(opened: _Opened) -> None:
    async def notice() -> None:
        await asyncio.Event().wait()

    opened.model.rings.notice = notice
    opened.old.failures = [_refused_within(100 * MB)]
    _late(opened, "while a node was short of memory")


def test_a_text_that_is_late_begins_no_pass_and_goes_on_later(
    toy_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, opened = Clock(), _Opened(toy_decoder)
    monkeypatch.setattr(deadlines, "time", clock)
    model = opened.model

    def step(new: int) -> None:
        offered = {
            "input_ids": np.ones((1, new), np.int64),
            "attention_mask": np.ones((1, state.length + new), np.int64),
            "position_ids": np.arange(state.length, state.length + new)[None],
        }
        model.step({spec.name: offered[spec.name] for spec in model.inputs}, state)

    try:
        with model.new_state() as state:
            with pipeload.deadline(5):
                step(3)
                clock.now_s += 6
                with pytest.raises(pipeload.DeadlineError, match="before a pass began"):
                    step(1)
            assert state.length == 3
            step(1)
            assert opened.old.steps == [[3], [1]]
            # A step that is on its way takes the caches with it, which are computed again.
            opened.old.passes = Gate()
            with pytest.raises(pipeload.DeadlineError, match="while a pass ran on old"), pipeload.deadline(0.01):
                step(1)
            opened.old.passes.open()
            step(1)
            assert state.length == 5
            assert opened.old.steps[-1] == [5]
    finally:
        opened.old.passes.open()
        model.close()
        opened.loop.close()
