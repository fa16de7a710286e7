"""Reservations are granted in ticket order, never above the limit, and every wait can be ended."""

from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background

from pipeload.errors import ClosedError, LoadError
from pipeload.pipeline.reservations import Reservations


def _never() -> bool:
    return False


class _Waiting:
    """A `cancelled` that tells when it is looked at, which is when a reservation begins to wait."""

    def __init__(self) -> None:
        self._looked = threading.Event()
        self.cancel = False

    def __call__(self) -> bool:
        self._looked.set()
        return self.cancel

    def wait_looked(self) -> None:
        assert self._looked.wait(PATIENCE_S)


def _waiting(budget: Reservations, nbytes: int, ticket: int) -> tuple[Background, _Waiting]:
    """A reservation in another thread, which has begun to wait."""
    cancelled = _Waiting()
    call = Background(budget.reserve, nbytes, ticket, cancelled)
    cancelled.wait_looked()
    # Holding the lock proves that the other thread gave it up to wait; to wake it would hide a change that wakes none.
    with budget._changed:
        pass
    return call, cancelled


def test_what_fits_is_granted_at_once() -> None:
    budget = Reservations(100)
    assert budget.reserve(60, 0, _never)
    assert budget.reserve(40, 1, _never)
    assert budget.reserved_bytes == 100


def test_a_reservation_waits_until_enough_is_released() -> None:
    budget = Reservations(100)
    budget.reserve(70, 0, _never)
    call, _ = _waiting(budget, 50, 1)
    budget.release(10)
    assert call.is_alive()
    budget.release(60)
    assert call.end() is True
    assert budget.reserved_bytes == 50


def test_a_later_ticket_waits_even_when_it_would_fit() -> None:
    budget = Reservations(100)
    budget.reserve(90, 0, _never)
    large, _ = _waiting(budget, 50, 1)
    small, _ = _waiting(budget, 5, 2)
    assert large.is_alive()
    assert small.is_alive()
    assert budget.reserved_bytes == 90
    budget.release(90)
    assert large.end() is True
    assert small.end() is True
    assert budget.reserved_bytes == 55


def test_a_ticket_waits_for_one_that_did_not_come_yet() -> None:
    budget = Reservations(100)
    second, _ = _waiting(budget, 1, 1)
    assert second.is_alive()
    assert budget.reserve(1, 0, _never)
    assert second.end() is True


def test_a_request_above_the_limit_is_refused_at_once_and_blocks_nobody() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    with pytest.raises(LoadError, match=r"needs 101 B, more than the 100 B"):
        budget.reserve(101, 1, _never)
    budget.release(100)
    assert budget.reserve(100, 2, _never)


def test_a_refused_request_out_of_turn_blocks_nobody() -> None:
    budget = Reservations(100)
    with pytest.raises(LoadError):
        budget.reserve(101, 1, _never)
    assert budget.reserve(1, 0, _never)
    assert budget.reserve(1, 2, _never)


def test_a_cancelled_reservation_gives_its_turn_away() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    first, cancelled = _waiting(budget, 100, 1)
    second, _ = _waiting(budget, 100, 2)
    cancelled.cancel = True
    budget.wake()
    assert first.end() is False
    assert budget.reserved_bytes == 100
    budget.release(100)
    assert second.end() is True


def test_cancelling_wakes_everybody() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    waiting = [_waiting(budget, 10, ticket) for ticket in range(1, 6)]
    for _, cancelled in waiting:
        cancelled.cancel = True
    budget.wake()
    assert [call.end() for call, _ in waiting] == [False] * 5
    budget.release(100)
    assert budget.reserve(100, 6, _never)


def test_a_cancelled_reservation_is_woken_also_where_one_that_goes_on_has_waited_longer() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    goes_on, _ = _waiting(budget, 10, 2)
    ends, cancelled = _waiting(budget, 10, 1)
    cancelled.cancel = True
    budget.wake()
    assert ends.end() is False
    budget.release(100)
    assert goes_on.end() is True


def test_a_reservation_that_is_cancelled_already_takes_nothing() -> None:
    budget = Reservations(100)
    assert not budget.reserve(10, 0, lambda: True)
    assert budget.reserved_bytes == 0
    assert budget.reserve(100, 1, _never)


def test_closing_wakes_everybody_and_refuses_from_then_on() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    waiting = [_waiting(budget, 10, ticket)[0] for ticket in range(1, 6)]
    budget.close()
    assert all(isinstance(call.wait(), ClosedError) for call in waiting)
    with pytest.raises(ClosedError):
        budget.reserve(1, 6, _never)
    budget.release(100)
    assert budget.reserved_bytes == 0


def test_a_higher_limit_wakes_who_waits() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    call, _ = _waiting(budget, 50, 1)
    budget.set_limit(150)
    assert call.end() is True


def test_a_lower_limit_holds_from_now_on() -> None:
    budget = Reservations(100)
    budget.reserve(60, 0, _never)
    budget.set_limit(50)
    assert budget.reserved_bytes == 60
    call, _ = _waiting(budget, 10, 1)
    assert call.is_alive()
    budget.release(60)
    assert call.end() is True


def test_who_waits_for_more_than_a_new_limit_is_refused() -> None:
    budget = Reservations(100)
    budget.reserve(100, 0, _never)
    call, _ = _waiting(budget, 80, 1)
    budget.set_limit(50)
    assert isinstance(call.wait(), LoadError)
    budget.release(100)
    assert budget.reserve(50, 2, _never)


def _two_waiting(limit_bytes: int, nbytes: int) -> tuple[Reservations, list[Background]]:
    """A full budget, and tickets 2 and 1, which began to wait in this order."""
    budget = Reservations(limit_bytes)
    budget.reserve(limit_bytes, 0, _never)
    return budget, [_waiting(budget, nbytes, ticket)[0] for ticket in (2, 1)]


def test_a_release_wakes_the_next_ticket_also_where_a_later_one_has_waited_longer() -> None:
    budget, waiting = _two_waiting(100, 50)
    budget.release(100)
    assert [call.end() for call in waiting] == [True, True]


def test_a_new_limit_wakes_the_next_ticket_also_where_a_later_one_has_waited_longer() -> None:
    budget, waiting = _two_waiting(100, 50)
    budget.set_limit(200)
    assert [call.end() for call in waiting] == [True, True]


def test_a_grant_wakes_the_next_ticket_also_where_a_later_one_has_waited_longer() -> None:
    budget = Reservations(100)
    waiting = [_waiting(budget, 1, ticket)[0] for ticket in (2, 1)]
    assert budget.reserve(1, 0, _never)
    assert [call.end() for call in waiting] == [True, True]


def test_a_skipped_ticket_gives_its_turn_away() -> None:
    budget = Reservations(100)
    waiting, _ = _waiting(budget, 10, 2)
    budget.skip(1)
    assert waiting.is_alive(), "ticket 0 has not come"
    budget.skip(0)
    assert waiting.end() is True


def test_skipping_a_ticket_that_was_granted_or_skipped_changes_nothing() -> None:
    budget = Reservations(100)
    budget.reserve(10, 0, _never)
    budget.skip(0)
    for _ in range(2):
        budget.skip(2)
    assert budget.reserve(10, 1, _never)
    assert budget.reserve(10, 3, _never)
    assert budget.reserved_bytes == 30


def test_nothing_is_kept_of_tickets_that_are_over() -> None:
    # A model draws a ticket for every shard of every pass, for as long as it lives.
    budget = Reservations(100)
    for ticket in range(0, 40, 4):
        budget.skip(ticket + 2)
        budget.reserve(1, ticket, _never)
        budget.skip(ticket)
        assert not budget.reserve(1, ticket + 1, lambda: True)
        budget.skip(ticket + 3)
        budget.skip(ticket + 3)
    assert budget._skipped == set()


class _Audited(Reservations):
    """Notes every grant under the budget's own lock."""

    def __init__(self, limit_bytes: int) -> None:
        self.ended: list[int] = []
        self.most_bytes = 0
        super().__init__(limit_bytes)

    def _skip(self, ticket: int) -> None:
        self.ended.append(ticket)
        super()._skip(ticket)

    @property
    def _reserved_bytes(self) -> int:
        return self._sum

    @_reserved_bytes.setter
    def _reserved_bytes(self, value: int) -> None:
        self._sum = value
        self.most_bytes = max(self.most_bytes, value)
        assert value >= 0


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_keep_order_and_limit(seed: int) -> None:
    """Loaders reserve one ticket after the other, a daemon releases in random order; some cancel, some ask too much."""
    choose = random.Random(seed)
    limit, count = choose.randint(50, 200), 400
    plan = [(choose.randint(0, limit + 10), choose.random() < 0.1) for _ in range(count)]
    budget, tickets = _Audited(limit), itertools.count()
    outcome: list[Any] = [None] * count
    granted: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def load() -> None:
        while (ticket := next(tickets)) < count:
            nbytes, cancelled = plan[ticket]
            try:
                outcome[ticket] = budget.reserve(nbytes, ticket, lambda cancelled=cancelled: cancelled)
            except LoadError:
                outcome[ticket] = LoadError
            if outcome[ticket] is True:
                granted.put(nbytes)

    def free() -> None:
        held: list[int] = []
        while (nbytes := granted.get(timeout=PATIENCE_S)) is not None:
            held.append(nbytes)
            while held and (granted.empty() or choose.random() < 0.5):
                budget.release(held.pop(choose.randrange(len(held))))
        for nbytes in held:
            budget.release(nbytes)

    loaders = [Background(load) for _ in range(choose.choice([2, 3, 8]))]
    daemon = Background(free)
    for loader in loaders:
        loader.end()
    granted.put(None)
    daemon.end()
    assert budget.most_bytes <= limit
    assert budget.reserved_bytes == 0
    for ticket, (nbytes, cancelled) in enumerate(plan):
        assert outcome[ticket] is (False if cancelled else LoadError if nbytes > limit else True)
    assert [ticket for ticket in budget.ended if outcome[ticket] is True] == sorted(
        ticket for ticket in range(count) if outcome[ticket] is True
    )
    assert sorted(budget.ended) == list(range(count))


@pytest.mark.parametrize("end", [Reservations.close, Reservations.wake], ids=["close", "cancel"])
def test_nobody_is_left_waiting_whenever_it_ends(end: Callable[[Reservations], None]) -> None:
    for seed in range(20):
        choose = random.Random(seed)
        budget, stop = Reservations(10), threading.Event()
        order = list(range(8))
        choose.shuffle(order)
        start = threading.Barrier(9)

        def reserve(ticket: int, budget: Reservations = budget, stop: Any = stop, start: Any = start) -> Any:
            start.wait(PATIENCE_S)
            return budget.reserve(7, ticket, stop.is_set)

        calls = [Background(reserve, ticket) for ticket in order]
        start.wait(PATIENCE_S)
        stop.set()
        end(budget)
        for call in calls:
            assert call.wait() is None or isinstance(call.error, ClosedError)
