"""One sweep serves the calls that wait, and a call that fails hinders none of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Gate,
    assert_same,
    run_sequentially,
)
from tests.engine.pipeline.rig import (
    NAMES,
    SCALE,
    Rig,
    nothing,
    plan_by_hand,
    rigged,
)

from pipeload.errors import BudgetError, ConfigError, LoadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.pipeline import pipeline as pipelines
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import Value, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan


def _values(seed: int = 0, batch: int = 2, length: int = 5) -> dict[str, Value]:
    return {name: to_value(array) for name, array in toys.inputs(batch, length, seed).items()}


@contextmanager
def _while_one_runs(rig: Rig, then: Callable[[Shard], None] = nothing) -> Iterator[Call[dict[str, Value]]]:
    """A call that runs, and has not got beyond its first shard; `then` is called before later reads."""
    gate = Gate()
    rig.pipeline._progress = lambda _: gate.stop_here()
    running = rig.submit()
    gate.wait_reached()
    try:
        yield running
    finally:
        rig.storage.before_read = then
        rig.pipeline._progress = None
        gate.open()


def test_calls_that_wait_are_served_by_one_sweep(toy: Path) -> None:
    with rigged(toy) as rig:
        with _while_one_runs(rig) as running:
            calls = [rig.pipeline.submit(Feed(pieces=[_values(seed, batch=1 + seed)]), Needs()) for seed in range(4)]
        assert_same({name: to_array(value) for name, value in running.result().items()}, rig.expected)
        for seed, call in enumerate(calls):
            found = {name: to_array(value) for name, value in call.result().items()}
            assert_same(found, run_sequentially(toy, toys.inputs(1 + seed, 5, seed), threads=1))
        assert rig.pipeline.stats.passes == 2
        rig.check()


def test_while_nothing_is_streamed_each_call_has_its_own_sweep(toy: Path) -> None:
    with rigged(toy, resident=NAMES) as rig:
        with _while_one_runs(rig):
            calls = [rig.submit() for _ in range(3)]
        for call in calls:
            call.result()
        assert rig.pipeline.stats.passes == 4


def test_a_call_that_fails_hinders_none_of_the_others_in_its_sweep(toy: Path) -> None:
    with rigged(toy) as rig:
        wrong = _values()
        wrong["input_ids"] = to_value(np.full((2, 5), 10**6))
        with _while_one_runs(rig):
            calls = [rig.submit(), rig.pipeline.submit(Feed(pieces=[wrong]), Needs()), rig.submit(), rig.submit()]
        calls[3].withdraw()
        for call in (calls[0], calls[2]):
            assert_same({name: to_array(value) for name, value in call.result().items()}, rig.expected)
        with pytest.raises(ConfigError, match="out of range"):
            calls[1].result()
        rig.check(passes=2)


def test_the_first_call_of_a_sweep_may_fail_too(toy: Path) -> None:
    with rigged(toy) as rig:
        wrong = _values()
        wrong["input_ids"] = to_value(np.full((2, 5), 10**6))
        with _while_one_runs(rig):
            calls = [rig.pipeline.submit(Feed(pieces=[wrong]), Needs()), rig.submit()]
        with pytest.raises(ConfigError, match="out of range"):
            calls[0].result()
        assert_same({name: to_array(value) for name, value in calls[1].result().items()}, rig.expected)
        rig.check(passes=2)


def test_a_shard_that_cannot_be_had_fails_all_calls_of_its_sweep(toy: Path) -> None:
    reads = count(1)

    def fail(shard: Shard) -> None:
        if shard.name == "block.003" and next(reads) == 2:
            raise OSError("disk")

    with rigged(toy) as rig:
        with _while_one_runs(rig, fail) as running:
            calls = [rig.submit() for _ in range(3)]
        assert_same({name: to_array(value) for name, value in running.result().items()}, rig.expected)
        for call in calls:
            with pytest.raises(LoadError, match="disk"):
                call.result()
        rig.check(passes=2)


@pytest.mark.parametrize(("fitting", "sweeps"), [(1, 8), (2, 5), (3, 3), (4, 2), (8, 1)])
def test_a_sweep_that_does_not_fit_is_halved_until_it_does(toy: Path, fitting: int, sweeps: int) -> None:
    manifest = manifests.read(toy)
    plan = plan_by_hand(manifest)

    def replan(pass_bytes: int, _: int) -> Plan:
        if pass_bytes > fitting:
            raise BudgetError("too much", needed_bytes=2, budget_bytes=1)
        return plan

    with rigged(toy, replan=replan) as rig:
        values, needs = _values(), Needs(pass_bytes=SCALE, held_bytes=SCALE)
        with _while_one_runs(rig):
            calls = [rig.pipeline.submit(Feed(pieces=[values]), needs) for _ in range(8)]
        for call in calls:
            assert_same({name: to_array(value) for name, value in call.result().items()}, rig.expected)
        assert rig.pipeline.stats.passes == 1 + sweeps


def test_the_first_calls_own_error_is_not_replaced_by_a_later_one_of_its_sweep(toy: Path) -> None:
    reads = count(1)

    def fail(shard: Shard) -> None:
        if shard.name == "block.003" and next(reads) == 2:
            raise OSError("disk")

    with rigged(toy) as rig:
        wrong = _values()
        wrong["input_ids"] = to_value(np.full((2, 5), 10**6))
        with _while_one_runs(rig, fail) as running:
            calls = [rig.pipeline.submit(Feed(pieces=[wrong]), Needs()), rig.submit()]
        running.result()
        with pytest.raises(ConfigError, match="out of range"):
            calls[0].result()
        with pytest.raises(LoadError, match="disk"):
            calls[1].result()
        rig.check(passes=2)


@pytest.mark.parametrize("resident", [(), tuple(NAMES)], ids=["streamed", "resident"])
def test_only_streamed_models_wait_for_callers_that_were_served(toy: Path, resident: tuple[str, ...]) -> None:
    with rigged(toy, resident=resident) as rig:
        asked: list[float] = []
        rig.exchange.calls.expect = lambda _, patience_s: asked.append(patience_s)  # type: ignore[method-assign]
        rig.check(passes=2)
        assert len(asked) == (0 if resident else 2)


def test_calls_that_were_served_together_are_waited_for(toy: Path) -> None:
    """Each of several callers gets its answer with every sweep, and not with every second one."""
    callers, rounds = 4, 5
    with rigged(toy) as rig:

        def call_again_and_again() -> None:
            for _ in range(rounds):
                rig.check()

        # However slow a caller is: the others wait for it.
        original = rig.exchange.calls.expect
        original(callers, PATIENCE_S)
        rig.exchange.calls.expect = lambda count, _: original(count, PATIENCE_S)  # type: ignore[method-assign]
        threads = [threading.Thread(target=call_again_and_again) for _ in range(callers - 1)]
        for thread in threads:
            thread.start()
        call_again_and_again()
        for thread in threads:
            thread.join()
        assert rig.pipeline.stats.passes == rounds


class _Unlike(Exception):  # noqa: N818
    """An error that cannot be copied."""

    def __init__(self, place: str, number: int) -> None:
        super().__init__(f"{place}, {number}")

    def __copy__(self) -> Self:
        raise TypeError


def test_every_caller_gets_an_error_of_the_callers_own_that_cannot_be_copied(toy: Path) -> None:
    error = _Unlike("here", 3)

    def fail(_: object) -> None:
        raise error

    with rigged(toy) as rig:
        with _while_one_runs(rig) as running:
            calls = [rig.submit() for _ in range(3)]
            # After the first call's own sweep.
            rig.storage.before_read = nothing
            real = rig.pipeline._sweep.run

            def run(*arguments: Any, **options: Any) -> None:
                rig.pipeline._progress = fail if len(arguments[0]) == 3 else None
                real(*arguments, **options)

            rig.pipeline._sweep.run = run  # type: ignore[method-assign]
        running.result()
        for call in calls:
            with pytest.raises(_Unlike, match="here, 3") as caught:
                call.result()
            assert caught.value is error
        rig.check(passes=2)


def test_a_copy_of_an_error_has_no_frames() -> None:
    """Also where a library has taught exceptions to be copied with them, as tblib does."""

    class WithFrames(Exception):  # noqa: N818
        def __copy__(self) -> WithFrames:
            return WithFrames(*self.args).with_traceback(self.__traceback__)

    with pytest.raises(WithFrames) as caught:
        raise WithFrames("here")
    copy = pipelines._copy_of(caught.value)
    assert caught.value.__traceback__ is not None
    assert (copy.args, copy.__cause__, copy.__traceback__) == (("here",), caught.value, None)
