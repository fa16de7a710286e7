"""A deadline by itself: which one holds, what it lets wait, and what it says when it has passed."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import Background, Clock

from pipeload.errors import ConfigError, DeadlineError
from pipeload.pipeline import deadlines
from pipeload.pipeline.callers import Caller, wait_for
from pipeload.pipeline.deadlines import check, deadline, held, left_s, lifted, result_of, within


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(deadlines, "time", made)
    return made


def _outcome(error: BaseException | None = None) -> Future[int]:
    made: Future[int] = Future()
    if error is None:
        made.set_result(3)
    else:
        made.set_exception(error)
    return made


@pytest.mark.parametrize("seconds", [0, -1, 0.0, math.nan, math.inf, True, None, "2", Decimal(2), 2j, [2]])
def test_a_deadline_is_a_number_of_seconds_above_0(seconds: Any) -> None:
    with pytest.raises(ConfigError, match="number of seconds above 0"):
        deadline(seconds)


@pytest.mark.parametrize("seconds", [1, 0.5, np.float32(0.5), np.int64(2), 1e300])
def test_any_finite_number_will_do(seconds: Any) -> None:
    with deadline(seconds):
        left = left_s()
        assert left is not None
        assert 0 < left <= threading.TIMEOUT_MAX
        assert result_of(_outcome(), str) == 3
    assert left_s() is None


@pytest.mark.parametrize(("outer", "inner", "holds"), [(2, 5, 2), (5, 2, 2)])
def test_of_several_deadlines_the_earliest_holds(clock: Clock, outer: float, inner: float, holds: float) -> None:
    with deadline(outer):
        with deadline(inner):
            assert left_s() == holds
            clock.now_s += holds
            with pytest.raises(DeadlineError, match=rf"The deadline of {holds} s passed before it began"):
                check("before it began")
        assert left_s() == outer - holds
    check("without one")


def test_a_deadline_counts_from_its_body_on(clock: Clock) -> None:
    made = deadline(2)
    clock.now_s += 10
    with made:
        assert left_s() == 2
        clock.now_s += 3
        assert left_s() == 0
        # What gives something back has no deadline.
        with lifted():
            assert left_s() is None
        assert left_s() == 0


def test_a_deadline_is_that_of_its_thread_until_it_is_taken_to_another_one(clock: Clock) -> None:
    def left_within(own: deadlines.Deadline | None) -> float | None:
        with within(own):
            return left_s()

    with deadline(2):
        own = deadlines.current()
        assert Background(left_within, None).end() is None
        assert Background(left_within, own).end() == 2


@pytest.mark.parametrize("caller", [False, True])
def test_what_does_not_come_in_time_is_waited_for_no_more(caller: bool) -> None:
    with (
        pytest.raises(DeadlineError, match=r"The deadline of 0\.001 s passed while a pass ran\. Give"),
        Caller() if caller else nullcontext(),
        deadline(0.001),
    ):
        wait_for(Future(), lambda: "while a pass ran")


def test_an_answer_that_is_there_stays_one(clock: Clock) -> None:
    with deadline(1):
        clock.now_s += 2
        assert result_of(_outcome(), str) == 3


@pytest.mark.parametrize("limited", [False, True])
def test_the_calls_own_error_of_this_kind_is_its_own(limited: bool) -> None:
    error = TimeoutError("of the call")
    with pytest.raises(TimeoutError, match="of the call") as caught, deadline(9) if limited else lifted():
        result_of(_outcome(error), str)
    assert caught.value is error


def test_a_lock_is_waited_for_until_the_deadline(clock: Clock) -> None:
    lock = threading.Lock()
    with deadline(1):
        clock.now_s += 2
        with lock, pytest.raises(DeadlineError, match="while memory moved"):
            with held(lock, "while memory moved"):
                pytest.fail("it is held elsewhere")
        # One that is free costs no time.
        with held(lock, "while memory moved"):
            assert lock.locked()
    with held(lock, ""):
        assert lock.locked()
    assert not lock.locked()
