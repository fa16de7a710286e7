"""The simulated schedule: small cases give the times computed by hand, and none beats the least possible time."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from tests.engine.plans import manifest_of, with_common

from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.schedule import Roofline, Schedule, ShardWork, roofline, simulate

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

_settings = settings(derandomize=True, database=None, deadline=None, max_examples=300)
CLOSE = 1e-9
ROOM = {"threads": 1, "cores": 100}
"""Loading Agents have processors of their own."""


def _streamed(nbytes: int, run_s: float, session_s: float = 0.0, *, kept: int = 0, loading_s: float = 0.0) -> ShardWork:
    return ShardWork(
        cold_bytes=nbytes,
        steady_bytes=nbytes - kept,
        streamed=True,
        session_s=session_s,
        run_s=run_s,
        loading_run_s=loading_s or run_s,
    )


def _resident(nbytes: int, run_s: float, session_s: float = 0.0) -> ShardWork:
    return ShardWork(
        cold_bytes=nbytes, steady_bytes=0, streamed=False, session_s=session_s, run_s=run_s, loading_run_s=run_s
    )


def _times(work: list[ShardWork], *, loaders: int, buffers: int, bandwidth: float = 1.0) -> tuple[float, float]:
    schedule = simulate(work, loaders=loaders, buffers=buffers, read_bytes_per_s=bandwidth, **ROOM)
    return schedule.first_s, schedule.steady_s


# By hand, with a byte a second


def test_one_loader_and_one_buffer_do_one_thing_after_the_other() -> None:
    work = [_streamed(3, 2.0, 0.5)] * 4
    assert _times(work, loaders=1, buffers=1) == pytest.approx((4 * 5.5, 4 * 5.5))


def test_with_two_buffers_reading_hides_computing() -> None:
    # Read 3 seconds each, one after the other; the last one runs for 2 more.
    assert _times([_streamed(3, 2.0)] * 4, loaders=1, buffers=2) == pytest.approx((4 * 3 + 2, 4 * 3))


def test_with_two_buffers_computing_hides_reading() -> None:
    # The first shard is read in 2 seconds, and then inference never waits.
    assert _times([_streamed(2, 3.0)] * 4, loaders=1, buffers=2) == pytest.approx((2 + 4 * 3, 4 * 3))


def test_a_session_holds_up_its_own_loader_only() -> None:
    # One loader: 2 + 2 seconds for each shard. Two: one makes a session while the other reads.
    work = [_streamed(2, 1.0, 2.0)] * 4
    assert _times(work, loaders=1, buffers=3)[1] == pytest.approx(4 * 4)
    assert _times(work, loaders=2, buffers=3)[1] == pytest.approx(4 * 2)


@pytest.mark.parametrize(
    ("threads", "cores", "steady_s"),
    [(2, 2, 4 * 3 + 4 * 2 / 2), (1, 2, 4 * 3), (3, 2, 4 * 3 + 4 * 2 / 2), (3, 4, 4 * 3), (4, 4, 4 * 3 + 4 * 2 / 4)],
)
def test_work_of_loaders_takes_processors_from_computing(threads: int, cores: int, steady_s: float) -> None:
    # Four shards compute for 3 seconds and are widened in 2; nothing is read.
    work = [_streamed(0, 3.0, 2.0)] * 4
    schedule = simulate(work, loaders=2, buffers=3, read_bytes_per_s=1.0, threads=threads, cores=cores)
    assert schedule.steady_s == pytest.approx(steady_s)


def test_the_storage_serves_one_after_the_other() -> None:
    # Four loaders read no more bytes in a second than the bandwidth says.
    assert _times([_streamed(5, 1.0)] * 3, loaders=4, buffers=5) == pytest.approx((16, 15))


def test_resident_shards_are_read_for_the_first_pass_only() -> None:
    work = [_resident(4, 1.0, 1.0), _resident(6, 2.0, 1.0)]
    # 4 + 1, then 6 + 1 with one loader; the second runs for 2.
    assert _times(work, loaders=1, buffers=0) == pytest.approx((14, 3))


def test_resident_shards_give_reading_time() -> None:
    # Read in 4 seconds, while the resident ones run for 4.
    work = [_streamed(4, 1.0), _resident(1, 2.0), _resident(1, 2.0)]
    assert _times(work, loaders=1, buffers=2)[1] == pytest.approx(5)
    # With one buffer as well: it is free while they run.
    assert _times(work, loaders=1, buffers=1)[1] == pytest.approx(5)


def test_what_is_kept_is_read_for_the_first_pass_only() -> None:
    work = [_streamed(10, 1.0, kept=7)] * 3
    assert _times(work, loaders=1, buffers=1) == pytest.approx((3 * 11, 3 * 4))


def test_computing_is_slower_in_the_part_of_a_pass_in_which_somebody_reads() -> None:
    # 5 of 10 seconds are reading: half of the slowdown from 10 to 12. In the first pass all of it.
    work = [_streamed(5, 10.0, loading_s=12.0)]
    first, steady = _times(work, loaders=1, buffers=2)
    assert (first, steady) == pytest.approx((5 + 12, 11))


def test_computing_is_not_slower_where_no_pass_reads() -> None:
    # A session of 2 seconds, and then 3 of computing; all weights are kept.
    assert _times([_streamed(5, 3.0, 2.0, kept=5, loading_s=6.0)], loaders=1, buffers=1)[1] == pytest.approx(5)


@pytest.mark.parametrize(("loaders", "sessions", "steady_s"), [(2, None, 2.5), (5, 4, 1.25), (4, 5, 1.25)])
def test_sessions_are_made_by_as_many_agents_as_there_are_and_have_room(
    loaders: int, sessions: int | None, steady_s: float
) -> None:
    work = [_streamed(0, 0.0, 5.0)]
    schedule = simulate(work, loaders=loaders, buffers=6, sessions=sessions, read_bytes_per_s=1.0, **ROOM)
    assert schedule.steady_s == pytest.approx(steady_s)


def test_bandwidth_counts() -> None:
    assert _times([_streamed(100, 0.0)] * 2, loaders=1, buffers=1, bandwidth=50.0) == pytest.approx((4, 4))


# The least possible


def _profile(bandwidth: dict[int, float], *times: tuple[float, float]) -> Profile:
    shards = {
        f"s{k}": ShardTimes(session_s=0, run_s=run, loading_run_s=run, pack_s=0, packed_run_s=packed)
        for k, (run, packed) in enumerate(times)
    }
    return Profile(process_bytes=0, cores=1, read_bytes_per_s=bandwidth, times={1: shards})


def test_the_bound_reads_through_the_page_cache_where_that_is_faster_as_plans_do() -> None:
    profile = replace(_profile({1: 2.0}, (3, 1), (2, 4)), cached_read_bytes_per_s={1: 5.0, 2: 6.0})
    assert roofline(manifest_of([10], [20]), profile).steady_s == pytest.approx(5)


def test_a_steady_pass_reads_or_computes_whatever_takes_longer() -> None:
    manifest, profile = manifest_of([10], [20]), _profile({1: 2.0, 2: 10.0}, (3, 1), (2, 4))
    # The best of both: bandwidth 10; computing 1 + 2.
    assert roofline(manifest, profile).steady_s == pytest.approx(3)
    assert roofline(manifest, _profile({1: 2.0}, (3, 1), (2, 4))).steady_s == pytest.approx(15)
    assert roofline(manifest, _profile({1: 2.0}, (3, 1), (2, 4)), 20).steady_s == pytest.approx(5)
    assert roofline(manifest, _profile({1: 2.0}, (3, 1), (2, 4)), 30).steady_s == pytest.approx(3)


def test_a_first_pass_reads_up_to_some_shard_and_computes_from_there() -> None:
    manifest = manifest_of([10], [20], [30])
    # Everything is read before the last one runs: 60 + 1.
    assert roofline(manifest, _profile({1: 1.0}, (1, 1), (1, 1), (1, 1))).first_s == pytest.approx(61)
    # The first is read, and then all compute.
    assert roofline(manifest, _profile({1: 1.0}, (50, 50), (50, 50), (50, 50))).first_s == pytest.approx(160)
    # Up to the second one, and computing from there.
    assert roofline(manifest, _profile({1: 1.0}, (1, 1), (90, 90), (5, 5))).first_s == pytest.approx(125)


def test_shards_without_bytes_only_compute() -> None:
    assert roofline(manifest_of([], []), _profile({1: 1.0}, (1, 1), (2, 2))).first_s == pytest.approx(3)


# For anything

_SECONDS = st.one_of(st.just(0.0), st.floats(1e-4, 10.0))


@st.composite
def _work(draw: Any) -> list[ShardWork]:
    work = []
    for _ in range(draw(st.integers(1, 12))):
        nbytes, run_s = draw(st.integers(0, 100)), draw(_SECONDS)
        streamed = draw(st.booleans())
        work.append(
            ShardWork(
                cold_bytes=nbytes,
                steady_bytes=draw(st.integers(0, nbytes)) if streamed else 0,
                streamed=streamed,
                session_s=draw(_SECONDS),
                run_s=run_s,
                loading_run_s=run_s * draw(st.floats(1.0, 3.0)),
            )
        )
    return work


_LOADERS, _BUFFERS, _BANDWIDTHS = st.integers(1, 4), st.integers(1, 5), st.floats(1.0, 1000.0)


@_settings
@given(_work(), _LOADERS, _BUFFERS, _BANDWIDTHS)
def test_nothing_is_faster_than_the_roofline(
    work: list[ShardWork], loaders: int, buffers: int, bandwidth: float
) -> None:
    schedule = simulate(work, loaders=loaders, buffers=buffers, read_bytes_per_s=bandwidth, **ROOM)
    total_s = sum(shard.run_s for shard in work)
    assert schedule.steady_s >= total_s * (1 - CLOSE)
    assert schedule.steady_s >= sum(shard.steady_bytes for shard in work) / bandwidth * (1 - CLOSE)
    read = done = 0.0
    for shard in work:
        read += shard.cold_bytes
        assert schedule.first_s >= (read / bandwidth + total_s - done) * (1 - CLOSE) - CLOSE
        done += shard.run_s


@_settings
@given(_work(), _LOADERS, _BUFFERS, _BANDWIDTHS)
def test_more_buffers_are_never_slower(work: list[ShardWork], loaders: int, buffers: int, bandwidth: float) -> None:
    def schedule(count: int) -> Schedule:
        return simulate(work, loaders=loaders, buffers=count, read_bytes_per_s=bandwidth, **ROOM)

    fewer, more = schedule(buffers), schedule(buffers + 1)
    assert more.first_s <= fewer.first_s * (1 + CLOSE)
    assert more.steady_s <= fewer.steady_s * (1 + CLOSE)


@_settings
@given(_work(), _LOADERS, _BUFFERS, _BANDWIDTHS, st.floats(1.0, 4.0))
def test_more_bandwidth_is_never_slower(
    work: list[ShardWork], loaders: int, buffers: int, bandwidth: float, factor: float
) -> None:
    slow = simulate(work, loaders=loaders, buffers=buffers, read_bytes_per_s=bandwidth, **ROOM)
    fast = simulate(work, loaders=loaders, buffers=buffers, read_bytes_per_s=bandwidth * factor, **ROOM)
    assert fast.first_s <= slow.first_s * (1 + CLOSE)
    assert fast.steady_s <= slow.steady_s * (1 + CLOSE)


# As the module describes it


def _by_recurrence(
    work: list[ShardWork], loaders: int, buffers: int, sessions: int | None, bandwidth: float, threads: int, cores: int
) -> tuple[float, float]:
    """The recurrence of the module's docstring, with the end of every run kept: first and steady seconds."""
    reading_s, alone_s = sum(one.steady_bytes for one in work) / bandwidth, sum(one.run_s for one in work)
    share = reading_s / max(reading_s, alone_s) if reading_s else 0.0
    agents, left, ends = [0.0] * loaders, list[float](), list[float]()
    read = run = 0.0
    for number in range(4):
        for one in work:
            if one.streamed or not number:
                agent = agents.index(min(agents))
                buffer = left[-buffers] if one.streamed and len(left) >= buffers else 0.0
                room = left[-sessions] if sessions and one.streamed and len(left) >= sessions else 0.0
                read = max(agents[agent], buffer, read) + (one.steady_bytes if number else one.cold_bytes) / bandwidth
                agents[agent] = max(read, room) + one.session_s
                run = max(run, agents[agent])
            run += one.run_s + (one.loading_run_s - one.run_s) * (share if number else 1.0)
            if one.streamed:
                left.append(run)
        ends.append(run)
    sessions_s = sum(one.session_s for one in work if one.streamed)
    bounds = (alone_s, reading_s, sessions_s / min(loaders, sessions or loaders))
    work_s = (min(threads, cores) * alone_s + sessions_s) / cores
    return ends[0], max((ends[3] - ends[1]) / 2, *bounds, work_s)


@_settings
@given(
    _work(), _LOADERS, _BUFFERS, st.one_of(st.none(), st.integers(1, 4)), _BANDWIDTHS, st.integers(1, 5),
    st.integers(1, 4),
)  # fmt: skip
def test_the_schedule_is_the_recurrence(
    work: list[ShardWork],
    loaders: int,
    buffers: int,
    sessions: int | None,
    bandwidth: float,
    threads: int,
    cores: int,
) -> None:
    schedule = simulate(
        work,
        loaders=loaders,
        buffers=buffers,
        sessions=sessions,
        read_bytes_per_s=bandwidth,
        threads=threads,
        cores=cores,
    )
    wanted = _by_recurrence(work, loaders, buffers, sessions, bandwidth, threads, cores)
    assert (schedule.first_s, schedule.steady_s) == pytest.approx(wanted, rel=CLOSE)


@_settings
@given(
    st.lists(st.tuples(st.integers(0, 50), _SECONDS, _SECONDS), min_size=1, max_size=6), st.integers(0, 200),
    st.integers(1, 6),
)  # fmt: skip
def test_the_roofline_is_the_maximum_over_all_shards(
    shards: list[tuple[int, float, float]], resident: int, other: int
) -> None:
    """The first and another have the same weights, which are read once."""
    manifest = manifest_of(*[[nbytes] * bool(nbytes) for nbytes, _, _ in shards])
    common = other < len(shards) and shards[0][0] > 0
    if common:
        manifest = with_common(manifest, (0, other))
    seconds = [min(pair) for _, *pair in shards]
    read = [shard.nbytes for shard in manifest.shards]
    if common:
        read[other] = 0
    bound = roofline(manifest, _profile({1: 4.0, 2: 2.0}, *[(run, packed) for _, run, packed in shards]), resident)
    first_s = max(sum(read[: k + 1]) / 4.0 + sum(seconds[k:]) for k in range(len(shards)))
    assert bound.first_s == pytest.approx(first_s, rel=CLOSE)
    assert bound.steady_s == pytest.approx(max(sum(seconds), (sum(read) - resident) / 4.0), rel=CLOSE)


@pytest.mark.parametrize(
    "value",
    [_resident(1, 1.0), Schedule(first_s=1.0, steady_s=1.0), Roofline(first_s=1.0, steady_s=1.0)],
    ids=lambda value: type(value).__name__,
)
def test_work_and_its_times_are_values_whose_fields_have_names(value: Any) -> None:
    names = [one.name for one in fields(value)]
    assert value == replace(value)
    with pytest.raises(FrozenInstanceError):
        setattr(value, names[0], 2)
    with pytest.raises(TypeError, match="positional"):
        type(value)(*(getattr(value, name) for name in names))
    assert not hasattr(value, "__dict__")
