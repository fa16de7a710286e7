"""The shards and parts that stay, by themselves: what is packed when, and whom a change wakes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background
from tests.engine.pipeline.exchanges import shard_at, waiting_for

from pipeload.pipeline.residents import Residents


def _residents(*shards: int, changed: threading.Condition | None = None) -> tuple[Residents, list[Any]]:
    """With these shards in memory; and those that are retired."""
    retired: list[Any] = []
    residents = Residents(changed or threading.Condition(), retired.append)
    for index in shards:
        residents.give_back(index, shard_at(index))
    return residents, retired


def test_parts_stay_until_they_are_forgotten() -> None:
    residents, _ = _residents()
    assert residents.parts == {}
    parts: Any = [object()]
    residents.keep(3, parts)
    found = residents.parts
    assert found == {3: parts}
    # It is a copy.
    found.clear()
    assert residents.forget(3) is parts
    assert residents.parts == {}


def test_one_shard_is_packed_at_a_time_until_none_waits() -> None:
    residents, _ = _residents(0, 1)
    assert not residents.packing
    residents.pack([0, 1])
    assert (residents.packing, residents.busy, residents.may_pack) == (True, False, True)
    assert residents.begin_packing() == 0
    assert (residents.packing, residents.busy, residents.may_pack) == (True, True, False)
    residents.end_packing()
    assert residents.begin_packing() == 1
    # The last one is still in work.
    assert (residents.packing, residents.busy, residents.may_pack) == (True, True, False)
    residents.end_packing()
    assert (residents.packing, residents.busy, residents.may_pack) == (False, False, False)


def test_the_error_of_a_failed_packing_is_raised_once_even_where_the_next_one_succeeds() -> None:
    residents, _ = _residents(0)
    error = OSError("disk")
    residents.end_packing(error)
    residents.end_packing()
    with pytest.raises(OSError, match="disk"):
        residents.borrow(0)
    assert residents.borrow(0) is not None


def test_a_shard_that_never_ran_is_replaced_at_once() -> None:
    residents, retired = _residents(0)
    old, packed = residents.shards[0], shard_at(0)
    assert residents.swap(0, packed, lambda: False)
    assert residents.shards == {0: packed}
    assert retired == [old]
    assert (packed.reserved_bytes, old.reserved_bytes) == (1, 0)


class _Counting(threading.Condition):
    """Counts how often all were woken."""

    woken = 0

    def notify_all(self) -> None:
        self.woken += 1
        super().notify_all()


def test_a_shard_that_no_swap_waits_for_wakes_no_agent_when_it_comes_back() -> None:
    changed = _Counting()
    residents, _ = _residents(0, changed=changed)
    assert residents.swap(0, shard_at(0), lambda: False)
    before = changed.woken
    for index in (0, 0):
        shard = residents.borrow(index)
        assert shard is not None
        residents.give_back(index, shard)
    assert changed.woken == before


def test_a_swap_waits_until_the_shard_is_given_back_whatever_else_waits() -> None:
    changed = threading.Condition()
    residents, _ = _residents(0, changed=changed)
    running = residents.borrow(0)
    assert running is not None

    def wait() -> bool:
        with changed:
            return changed.wait(PATIENCE_S)

    other = Background(wait)
    waiting_for(changed, 1)
    swapping = Background(residents.swap, 0, shard_at(0), lambda: False)
    waiting_for(changed, 2)
    residents.give_back(0, running)
    assert swapping.end() is True
    assert other.end() is True


@pytest.mark.parametrize(
    "change",
    [
        lambda residents: residents.drop(0),
        lambda residents: residents.pack([0]),
        lambda residents: residents.end_packing(),
        lambda residents: residents.swap(0, shard_at(0), lambda: False),
    ],
    ids=["drop", "pack", "end of packing", "swap"],
)
def test_each_change_wakes_all_who_wait(change: Callable[[Residents], object]) -> None:
    changed = threading.Condition()
    residents, _ = _residents(0, changed=changed)

    def wait() -> bool:
        with changed:
            return changed.wait(PATIENCE_S)

    waiting = [Background(wait) for _ in range(2)]
    waiting_for(changed, 2)
    change(residents)
    assert [one.end() for one in waiting] == [True, True]
