"""Where a core is little, the threads of a model are where its plan says, and no other thread moves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially
from tests.engine.pipeline.rig import Scripted, plan_by_hand, rigged

import pipeload
from pipeload.machine import cores
from pipeload.pipeline import affinity
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile

USABLE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(USABLE) < 2, reason="needs two cores")
BIG, LITTLE = USABLE[:1], USABLE[1:2]
CAPACITIES = {BIG[0]: 1024, LITTLE[0]: 400} if len(USABLE) > 1 else {}


def _places() -> dict[str, set[int]]:
    """Cores of each thread of this process, by its name, or its number where several have it."""
    found: dict[str, set[int]] = {}
    own = {thread.native_id: thread.name for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        allowed = set()
        for run in fields["Cpus_allowed_list"].split(","):
            first, _, last = run.partition("-")
            allowed |= set(range(int(first), int(last or first) + 1))
        found[own.get(int(task.name), task.name)] = allowed
    return found


@pytest.fixture(autouse=True)
def others_stay() -> Iterator[None]:
    before = _places()
    yield
    after = _places()
    # Also those of other tests' libraries.
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }


def _little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine as a folder says it is: its second core is little, and this process has the first two."""
    for core in os.sched_getaffinity(0):
        folder = tmp_path / "cpu" / f"cpu{core}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text("1024\n" if [core] == BIG else "400\n")
    found = partial(cores.core_capacities, tmp_path / "cpu")
    monkeypatch.setattr("pipeload.measuring.profiler.core_capacities", found)


@pytest.mark.parametrize("threads", [1, len(USABLE)])
def test_a_model_computes_on_the_big_core_and_reads_on_the_others(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    _little(tmp_path, monkeypatch)
    before = set(_places())
    with pipeload.load(toy, threads=threads) as model:
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=threads))
        found = {name: places for name, places in _places().items() if name not in before}
    others = set(USABLE) if threads > 1 else set(USABLE[1:])
    computing = set(USABLE) if threads > 1 else set(BIG)
    assert found.pop("pipeload-inference") == computing
    assert {name for name in found if name.startswith("pipeload-")} >= {"pipeload-daemon", "pipeload-loader-0"}
    for name, places in found.items():
        # A thread without a name belongs to a session.
        assert places == (others if name.startswith("pipeload-") else computing)


def _pools(before: set[str]) -> list[set[int]]:
    return [places for name, places in _places().items() if name not in before and name.isdigit()]


def _scripted(**options: Any) -> Callable[[Any], Any]:
    """A replanner of a machine with a little core, which makes the plans that the test names."""

    def make(manifest: Any) -> Any:
        plan = plan_by_hand(manifest, resident=[shard.name for shard in manifest.shards], **options)
        made = Scripted(manifest, lambda *_: made.now)
        made._profile = replace(made._profile, core_capacities=CAPACITIES)
        made.now = plan
        return plan, made

    return make


def _with_threads(plan: Plan, threads: int) -> Plan:
    """Sessions with more threads take more memory."""
    return replace(plan, threads=threads, peak_bytes=plan.peak_bytes + 100_000_000)


def test_threads_of_sessions_are_where_the_inference_agent_is() -> None:
    capacities = {BIG[0]: 1024, LITTLE[0]: 400}
    pool = affinity.Affinity(capacities)
    assert pool.pool(1) == frozenset()
    seen = []

    def agent() -> None:
        me = threading.current_thread()
        me.name = affinity.INFERENCE
        pool.place([me], 1)
        seen.append((cores.affinity(0), pool.pool(1), pool.pool(2)))
        os.sched_setaffinity(0, LITTLE)
        seen.append((cores.affinity(0), pool.pool(1), pool.pool(2)))

    thread = threading.Thread(target=agent)
    thread.start()
    thread.join()
    assert seen == [(set(BIG), set(BIG), set(capacities)), (set(LITTLE), set(LITTLE), set(LITTLE))]
    # The kernel may need a moment to forget it.
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        pass
    assert pool.pool(1) == frozenset()


def test_a_plan_with_other_threads_moves_the_agents(toy: Path) -> None:
    with rigged(toy, replanner=_scripted()) as rig:
        rig.check()
        assert _places()["pipeload-inference"] == set(BIG)
        assert _places()["pipeload-loader-0"] == _places()["pipeload-daemon"] == set(LITTLE)
        before = set(_places())
        rig.replanner.now = _with_threads(rig.replanner.now, 2)
        rig.check()
        both = set(BIG + LITTLE)
        assert all(places == both for name, places in _places().items() if name.startswith("pipeload-"))
        pools = _pools(before)
        assert len(pools) == len(rig.manifest.shards)
        assert all(places == both for places in pools)
        rig.replanner.now = _with_threads(rig.replanner.now, 1)
        rig.check()
        assert _places()["pipeload-inference"] == set(BIG)
        assert _places()["pipeload-loader-0"] == set(LITTLE)


def test_agents_that_another_program_has_moved_stay_where_it_wants_them(toy: Path) -> None:
    with rigged(toy, replanner=_scripted()) as rig:
        rig.check()
        before = set(_places())
        for thread in threading.enumerate():
            if thread.name.startswith("pipeload-"):
                os.sched_setaffinity(thread.native_id, LITTLE)
        rig.replanner.now = replace(_with_threads(rig.replanner.now, 2), loaders=2)
        rig.check()
        moved = {name: places for name, places in _places().items() if name.startswith("pipeload-")}
        assert "pipeload-loader-1" in moved
        assert all(places == set(LITTLE) for places in moved.values())
        assert len(_pools(before)) == len(rig.manifest.shards)
        assert all(places == set(LITTLE) for places in _pools(before))


def test_a_kernel_that_refuses_leaves_all_threads_where_they_are(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.sched_setaffinity

    def refuse(thread: int, cores: Any) -> None:
        real(thread, {4000} if set(cores) == set(LITTLE) else cores)

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with rigged(toy, replanner=_scripted()) as rig:
        rig.check(2)
        assert _places()["pipeload-inference"] == set(BIG)
        assert _places()["pipeload-loader-0"] == set(USABLE)


def test_where_cores_are_equal_the_kernel_is_not_asked(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(cores, "affinity", lambda *_: pytest.fail("asked"))
    with rigged(toy, resident=[], loaders=2, buffers=2) as rig:
        rig.check(2)
    for capacities in ({}, {BIG[0]: 1024}, dict.fromkeys(USABLE, 400)):
        placed = affinity.Affinity(capacities)
        placed.place(threading.enumerate(), 1)
        assert placed.pool(2) == frozenset()


def test_a_process_with_one_core_has_nothing_to_choose(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _little(tmp_path, monkeypatch)
    found = []

    def load() -> None:
        os.sched_setaffinity(0, LITTLE)
        with pipeload.load(toy) as model:
            model.run(toys.inputs())
            found.extend(places for thread, places in _places().items() if thread.startswith("pipeload-"))
            assert model.profile.core_capacities == {LITTLE[0]: 400}

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert found
    assert all(places == set(LITTLE) for places in found)


def test_a_profile_of_other_cores_is_used_on_those_that_are_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _little(tmp_path, monkeypatch)
    other = Profile(process_bytes=1, cores=8, core_capacities={90: 1024, 91: 400})
    with pipeload.load(toy, profile=other) as model:
        assert model.profile.core_capacities == cores.core_capacities(tmp_path / "cpu")
        # Nothing was measured: threads on the big core would wait for those on the little ones.
        assert model.plan.threads == 1
