"""A placement changes rarely: never for noise, once for a change of the nodes, and soon only where there is no room."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from pipeload.planning import adapting
from pipeload.planning.adapting import Adapting, Outlook, Sending, Slowness
from pipeload.planning.placement import Placement, Segment

LOOKS, FORCED_LOOKS, REST_S = adapting._LOOKS, adapting._FORCED_LOOKS, adapting._REST_S
LOOK_S = 0.5


def placed(seconds: float, node: str = "a") -> Placement:
    return Placement(segments=(Segment(node=node, begin=0, end=1, run_s=seconds, read_s=0.0, send_s=0.0),))


def outlook(present_s: float | None, best_s: float | None) -> Outlook:
    return Outlook(
        present=None if present_s is None else placed(present_s), best=None if best_s is None else placed(best_s, "b")
    )


def clock() -> Iterator[float]:
    now_s = 0.0
    while True:
        yield now_s
        now_s += LOOK_S


class _Machine:
    """Two nodes; the model is on one of them. Every change of the placement is counted."""

    def __init__(self, noise: Callable[[], float], latency_share: float = 1.0) -> None:
        self.adapting, self._noise, self._times = Adapting(latency_share), noise, clock()
        self.seconds = {"a": 1.0, "b": 1.0}
        self.on = "a"
        self.changes_s: list[float] = []

    def run(self, looks: int) -> None:
        for _ in range(looks):
            seen = {name: seconds * self._noise() for name, seconds in self.seconds.items()}
            best = min(seen, key=lambda name: seen[name])
            now_s = next(self._times)
            told = Outlook(present=placed(seen[self.on], self.on), best=placed(seen[best], best))
            if self.adapting.look(told, now_s) == "move":
                self.on = best
                self.adapting.changed(now_s)
                self.changes_s.append(now_s)


@pytest.mark.parametrize("latency_share", [0.0, 0.5, 1.0])
def test_noise_below_the_threshold_changes_nothing(latency_share: float) -> None:
    for seed in range(10):
        noise = random.Random(seed)
        machine = _Machine(lambda noise=noise: noise.uniform(0.96, 1.04), latency_share)
        machine.run(200)
        assert machine.changes_s == [], seed


def test_large_noise_that_does_not_last_changes_nothing() -> None:
    """Three looks in ten see a node at twice its time, and they come as they like."""
    for seed in range(10):
        noise = random.Random(seed)
        machine = _Machine(lambda noise=noise: 2.0 if noise.random() < 0.3 else 1.0)
        machine.run(200)
        assert machine.changes_s == [], seed


def test_a_change_of_a_node_is_one_change_of_the_placement() -> None:
    for seed in range(30):
        noise = random.Random(seed)
        machine = _Machine(lambda noise=noise: noise.uniform(0.95, 1.05))
        machine.run(noise.randrange(50))
        machine.seconds[noise.choice("ab")] *= noise.uniform(1.5, 5.0)
        slow = max(machine.seconds, key=lambda name: machine.seconds[name])
        machine.run(150)
        assert machine.on != slow, seed
        assert len(machine.changes_s) <= 1, seed


@pytest.mark.parametrize("period", [LOOKS + 1, 2 * LOOKS, 500])
def test_nodes_that_change_all_the_time_are_followed_ever_more_rarely(period: int) -> None:
    """In more than an hour, in which one or the other node is twice as slow in turn."""
    machine = _Machine(lambda: 1.0)
    for number in range(8000 // period):
        machine.seconds = {"a": 1.0 + number % 2, "b": 2.0 - number % 2}
        machine.run(period)
    assert 1 <= len(machine.changes_s) <= 16
    assert all(after - before >= REST_S for before, after in pairwise(machine.changes_s))


def decisions(adapts: Adapting, looks: list[Outlook], begin_s: float = 0.0) -> list[str]:
    return [adapts.look(one, begin_s + LOOK_S * number) for number, one in enumerate(looks)]


def test_a_gain_must_hold_for_looks_in_a_row() -> None:
    gain, none = outlook(1.0, 0.8), outlook(1.0, 0.95)
    assert decisions(Adapting(), [gain] * LOOKS) == ["keep"] * (LOOKS - 1) + ["move"]
    looks = ([gain] * (LOOKS - 1) + [none]) * 5
    assert {*decisions(Adapting(), looks)} == {"keep"}


def test_the_gain_is_ten_percent() -> None:
    assert {*decisions(Adapting(), [outlook(1.0, 0.91)] * 50)} == {"keep"}
    assert "move" in decisions(Adapting(), [outlook(1.0, 0.89)] * 50)


def test_a_stage_without_room_moves_sooner_and_without_rest() -> None:
    adapts = Adapting()
    adapts.changed(0.0)
    found = decisions(adapts, [outlook(None, 5.0)] * FORCED_LOOKS)
    assert found == ["keep"] * (FORCED_LOOKS - 1) + ["move"]


def test_a_move_that_failed_is_not_tried_again_at_once() -> None:
    adapts = Adapting()
    decisions(adapts, [outlook(None, 5.0)] * FORCED_LOOKS)
    adapts.changed(2.0, failed=True)
    looks = int(3 * REST_S / LOOK_S)
    found = decisions(adapts, [outlook(None, 5.0)] * looks, begin_s=2.0)
    assert found.index("move") * LOOK_S >= REST_S


def test_where_nothing_has_room_there_is_nothing_to_do() -> None:
    found = decisions(Adapting(), [outlook(None, None)] * FORCED_LOOKS)
    assert found == ["keep"] * (FORCED_LOOKS - 1) + ["give up"]
    assert {*decisions(Adapting(), [outlook(1.0, None)] * 50)} == {"keep"}


def test_room_that_comes_back_is_seen_after_giving_up() -> None:
    adapts = Adapting()
    assert "give up" in decisions(adapts, [outlook(None, None)] * 10)
    assert "move" in decisions(adapts, [outlook(None, 1.0)] * 10, begin_s=5.0)
    assert {*decisions(adapts, [outlook(1.0, 1.0)] * 10, begin_s=10.0)} == {"keep"}


def test_the_usual_swing_is_no_slowness() -> None:
    known = Slowness()
    assert known.look("a", (1.2, 1.1), 0.0, runs=True) == (1.0, 1.0)
    assert known.look("a", (1.5, 1.1), 1.0, runs=True) == (1.5, 1.0)
    # A little more or less than before would only have all placements predicted again.
    assert known.look("a", (1.7, 1.1), 2.0, runs=True) == (1.5, 1.0)
    assert known.look("a", (3.0, 2.0), 3.0, runs=True) == (3.0, 2.0)
    assert known.look("a", (1.0, 1.0), 4.0, runs=True) == (1.0, 1.0)


def test_a_node_that_was_slow_is_tried_again_ever_later() -> None:
    """It runs nothing any more, so nothing tells whether it is still slow."""
    known, now_s = Slowness(), 0.0
    assert known.look("b", None, now_s, runs=False) == (1.0, 1.0)
    waits_s = []
    for _ in range(8):
        assert known.look("a", (3.0, 1.0), now_s, runs=True) == (3.0, 1.0)
        left_s = now_s
        while known.look("a", None, now_s, runs=False) != (1.0, 1.0):
            now_s += 10.0
        waits_s.append(now_s - left_s)
    assert waits_s[0] >= 600
    assert all(after >= before for before, after in pairwise(waits_s))
    assert waits_s[-1] == max(waits_s) < 10_000
    assert waits_s[1] >= 2 * waits_s[0] - 20


def test_a_node_with_another_stage_is_as_slow_as_before_until_a_pass_tells() -> None:
    known = Slowness()
    known.look("a", (3.0, 1.0), 0.0, runs=True)
    for now_s in (1.0, 10_000.0):
        assert known.look("a", None, now_s, runs=True) == (3.0, 1.0)
    assert known.look("a", (1.0, 1.0), 10_001.0, runs=True) == (1.0, 1.0)


PAIR, OTHER = ("a", "b"), ("b", "c")


def measurements(sending: Sending, factors: list[dict[tuple[str, str], float]], begin_s: float = 0.0) -> list[str]:
    """Names of the nodes whose links each look has measured, joined."""
    return ["".join(sorted(sending.look(told, begin_s + LOOK_S * look))) for look, told in enumerate(factors)]


def test_messages_that_take_longer_for_some_looks_have_the_links_of_both_nodes_measured() -> None:
    factors = [{PAIR: 3.0, OTHER: 1.0}] * FORCED_LOOKS
    assert measurements(Sending(), factors[1:]) == [""] * (FORCED_LOOKS - 1)
    assert measurements(Sending(), factors) == [*[""] * (FORCED_LOOKS - 1), "ab"]


def test_messages_that_swing_measure_nothing() -> None:
    for seed in range(10):
        noise = random.Random(seed)
        swings = [{PAIR: noise.uniform(1.0, 1.9), OTHER: noise.uniform(1.0, 1.9)} for _ in range(500)]
        assert not any(measurements(Sending(), swings))
        spells = [{PAIR: 9.0 if look % FORCED_LOOKS else 1.0} for look in range(500)]
        assert not any(measurements(Sending(), spells))


def test_a_link_that_stays_as_it_was_measured_is_not_measured_at_each_look() -> None:
    sending = Sending()
    slow = [{PAIR: 8.0}] * 200
    assert [found for found in measurements(sending, slow) if found] == ["ab"]
    faster = measurements(sending, [{PAIR: 1.0}] * 200, begin_s=200.0)
    assert [found for found in faster if found] == ["ab"], "it has changed again"


def test_links_that_change_all_the_time_are_measured_at_most_once_a_rest() -> None:
    factors = [{PAIR: 8.0 if look // 10 % 2 else 1.0} for look in range(1000)]
    found = [look * LOOK_S for look, nodes in enumerate(measurements(Sending(), factors)) if nodes]
    assert len(found) > 1
    assert all(later - sooner >= REST_S for sooner, later in pairwise(found))


def test_a_link_that_was_slow_is_measured_again_ever_later() -> None:
    """It carries nothing any more, so nothing tells that it is fast again."""
    sending = Sending()
    assert any(measurements(sending, [{PAIR: 8.0}] * FORCED_LOOKS))
    found = [look * LOOK_S for look, nodes in enumerate(measurements(sending, [{}] * 12_000, 2.0)) if nodes]
    assert found[0] == pytest.approx(adapting._SLOW_S, abs=1.0)
    assert [later - sooner for sooner, later in pairwise(found)] == [
        pytest.approx(factor * adapting._SLOW_S, abs=1.0) for factor in (2, 4)[: len(found) - 1]
    ]
    assert len(found) == 3
