"""benchmarks/ring: frames take the time of their packets on both links, and the latency; figures of the trace."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from benchmarks.ring.trace import Answer, Contender, Event, Move, Report
from benchmarks.ring.wire import HEADER_BYTES, Link, Switch, wire_bytes

_GIGABIT = 10**9
_PAYLOAD, _HEADERS = 1448, 66


def _frame(to: int, came: int, segments: int) -> bytes:
    """A frame of TCP with full segments, from one address to another."""
    kind, size = (1, _PAYLOAD) if segments > 1 else (0, 0)
    header = struct.pack("<BBHHHH", 1, kind, _HEADERS, size, 34, 16)
    addresses = to.to_bytes(6, "big") + came.to_bytes(6, "big")
    return header + addresses + bytes(_HEADERS - len(addresses) + segments * _PAYLOAD)


def _switch(*bits_per_s: int | None, latency_s: float = 0.005) -> Switch:
    """A switch that knows the addresses 1, 2 ... of its ports."""
    switch = Switch([Link(bits_per_s=rate, latency_s=latency_s) for rate in bits_per_s])
    for port in range(len(bits_per_s)):
        switch.forward(_frame(99, port + 1, 1), port, now_s=0.0)
    return switch


def test_a_large_frame_takes_the_time_of_its_packets() -> None:
    """A packet of 1,448 bytes of data has 66 bytes of headers, and 24 bytes of the wire's own."""
    assert [wire_bytes(_frame(2, 1, segments)) for segments in (1, 2, 45)] == [1538, 2 * 1538, 45 * 1538]


def test_a_short_frame_is_filled_up() -> None:
    assert wire_bytes(bytes(HEADER_BYTES) + bytes(42)) == 60 + 24


@pytest.mark.parametrize("rates", [(_GIGABIT, _GIGABIT // 10), (_GIGABIT // 10, _GIGABIT), (_GIGABIT // 10, None)])
def test_a_frame_takes_the_slower_link_once_and_the_latency(rates: tuple[int, int | None]) -> None:
    switch = _switch(*rates)
    ((at_s, port),) = switch.forward(_frame(2, 1, 45), 0, now_s=1.0)
    assert port == 1
    assert at_s == pytest.approx(1.0 + 45 * 1538 * 8 / (_GIGABIT // 10) + 0.005)


def test_frames_of_two_senders_share_the_receivers_link() -> None:
    switch = _switch(_GIGABIT, _GIGABIT, _GIGABIT, latency_s=0.0)
    own_s = 45 * 1538 * 8 / _GIGABIT
    ends = [switch.forward(_frame(3, sender + 1, 45), sender, now_s=1.0)[0][0] for sender in (0, 1)]
    assert ends == [pytest.approx(1.0 + own_s), pytest.approx(1.0 + 2 * own_s)]


def test_a_link_that_is_full_drops_frames_and_carries_the_others_at_its_rate() -> None:
    switch = _switch(_GIGABIT // 10, None, latency_s=0.0)
    frame = _frame(2, 1, 45)
    arrived = [at for number in range(100) for at, _ in switch.forward(frame, 0, now_s=1.0 + number / 1000)]
    assert len(arrived) < 100
    assert all(
        later - earlier == pytest.approx(45 * 1538 * 8 / (_GIGABIT // 10)) for earlier, later in pairwise(arrived)
    )
    assert arrived[-1] <= 1.1 + 0.1 + 45 * 1538 * 8 / (_GIGABIT // 10)


def test_a_frame_to_all_goes_to_all_others() -> None:
    switch = _switch(_GIGABIT, _GIGABIT, _GIGABIT)
    assert {port for _, port in switch.forward(_frame(77, 2, 1), 1, now_s=1.0)} == {0, 2}


def _answers(*ends: tuple[float, float], outcome: str = "right") -> list[Answer]:
    return [Answer(at_s=at_s, latency_s=latency_s, outcome=outcome) for at_s, latency_s in ends]


def _contender(answers: list[Answer], **changes: Any) -> Contender:
    """A run of 10 s whose only event is at its beginning."""
    event = Event(name="event", at_s=0.0, end_s=10.0, peak_bytes={}, limit_bytes={})
    given: dict[str, Any] = {
        "name": "one", "before": "", "events": [event], "answers": answers, "moves": [], "errors": {}, "oom_kills": 0,
        "links_cores": 0.0,
    }  # fmt: skip
    return Contender(**given | changes)


def test_a_stall_is_the_longest_time_without_an_answer_also_at_the_end() -> None:
    for ends, stall_s in (((3.0, 4.0, 9.0), 5.0), ((5.5, 9.0), 5.5), ((1.0, 2.0), 8.0), ((), 10.0)):
        one = _contender(_answers(*((end, 1.0) for end in ends)))
        assert one.stall_s(one.events[0]) == stall_s
    failed = _contender(_answers((3.0, 1.0), (9.0, 1.0)) + _answers((6.0, 1.0), outcome="error"))
    assert failed.stall_s(failed.events[0]) == 6.0


def test_an_event_has_settled_when_three_answers_are_as_those_of_later() -> None:
    one = _contender(_answers((1.0, 5.0), (2.0, 1.0), (3.0, 5.0), (4.0, 1.1), (5.0, 1.2), (6.0, 1.0), (7.0, 1.0)))
    assert one.settled_s(one.events[0]) == 4.0
    never = _contender(_answers((1.0, 1.0), (6.0, 1.0), (7.0, 3.0), (8.0, 1.0)))
    assert never.settled_s(never.events[0]) is None
    assert _contender([]).settled_s(never.events[0]) is None


def test_requests_that_failed_are_not_in_time() -> None:
    one = _contender(_answers((1.0, 1.0), (2.0, 3.0)) + _answers((3.0, 0.1), (4.0, 0.1), outcome="error"))
    assert one.within_share(2.0) == 0.25
    assert one.latencies_s() == [1.0, 3.0]


def test_a_report_fails_for_a_wrong_answer_a_fault_a_kill_and_a_move_without_need() -> None:
    good = _contender(_answers((1.0, 1.0)) + _answers((2.0, 1.0), outcome="error"))
    move = Move(at_s=1.0, why="", after=None, waited_s=0.0)

    def report(contender: Contender, calm: Contender) -> Report:
        return Report(model="toy", window_s=10.0, machine={}, contenders=[contender], calm=[calm])

    calm = _contender(_answers((1.0, 1.0)))
    assert report(_contender(good.answers, moves=[move]), calm).ok
    for outcome in ("wrong", "fault"):
        assert not report(_contender(_answers((1.0, 1.0), outcome=outcome)), calm).ok
    assert not report(_contender(good.answers, oom_kills=1), calm).ok
    assert not report(good, _contender(calm.answers, moves=[move])).ok
    assert not report(good, good).ok, "without events no request fails"
