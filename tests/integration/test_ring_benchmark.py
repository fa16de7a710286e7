"""The links of benchmarks/ring, as figures: a frame takes the time of its packets on both links, and the latency."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
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
