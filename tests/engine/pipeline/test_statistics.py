"""Statistics, trace and progress tell the events of a pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.engine.pipeline.rig import (
    NAMES,
    rigged,
)

from pipeload.errors import ConfigError
from pipeload.tracing.trace import Progress, read_bytes


def test_statistics_add_up(toy: Path) -> None:
    with rigged(toy) as rig:
        assert rig.pipeline.stats.passes == 0
        assert rig.pipeline.stats.first_pass_s is None
        assert rig.pipeline.stats.last is None
        rig.check(passes=3)
        stats = rig.pipeline.stats
        assert stats.passes == 3
        assert stats.first_pass_s is not None
        assert stats.last is not None
        assert stats.last_pass_s == stats.last.seconds
        assert stats.budget_bytes == rig.pipeline.plan.budget_bytes
        assert stats.read_bytes >= 3 * rig.manifest.weight_bytes
        assert stats.peak_bytes > 0
        assert {"inference", "loader-0", "loader-1"} <= stats.last.agents.keys()
    assert rig.pipeline.stats.read_bytes == sum(nbytes for _, nbytes in rig.storage.read_bytes)


def test_the_trace_tells_what_every_agent_did(toy: Path) -> None:
    with rigged(toy, resident=NAMES[:-1], loaders=2) as rig:
        rig.check(passes=3)
        rig.wait(lambda: not rig.exchange._retired)
        spans = rig.pipeline.trace.spans
        # The last shard of a pass without a caller may be on its way.
        known = [span for span in spans if span.pass_number <= 3]
        assert {span.agent for span in known} <= {"inference", "loader-0", "loader-1", "daemon"}
        reads = [span for span in known if span.kind == "read"]
        assert read_bytes(reads) == rig.manifest.weight_bytes + 2 * rig.manifest.shards[-1].nbytes
        for kind in ("reserve", "session"):
            assert Counter(span.shard for span in known if span.kind == kind) == Counter(s.shard for s in reads)
        runs = [span for span in known if span.kind == "run"]
        assert [span.shard for span in runs] == NAMES * 3
        assert [span.pass_number for span in runs] == [1] * 8 + [2] * 8 + [3] * 8
        assert {span.shard for span in known if span.kind == "free"} == {"epilogue"}
        # Nothing runs before it was read and made.
        ready = {(s.shard, s.pass_number): s.end_s for s in known if s.kind == "session"}
        for run in runs:
            assert run.begin_s >= ready.get((run.shard, run.pass_number), 0)
        counters = {sample.counter for sample in rig.pipeline.trace.samples}
        assert counters == {"buffers", "reserved_bytes", "rss_bytes"}


def test_progress_is_told_after_each_shard(toy: Path) -> None:
    told: list[Progress] = []
    with rigged(toy, progress=told.append) as rig:
        rig.check(passes=2)
        total = rig.manifest.weight_bytes
        done = np.cumsum([shard.nbytes for shard in rig.manifest.shards]).tolist()
    assert [(one.shard, one.index, one.count) for one in told] == [
        (name, index, len(NAMES)) for index, name in enumerate(NAMES, start=1)
    ] * 2
    for one in (told[:8], told[8:]):
        elapsed = [progress.elapsed_s for progress in one]
        assert elapsed == sorted(elapsed)
    for progress, nbytes in zip(told, done * 2, strict=True):
        assert progress.eta_s == pytest.approx(progress.elapsed_s * (total - nbytes) / nbytes)


@pytest.mark.parametrize("call", ["run", "set_budget"])
def test_the_progress_callback_cannot_wait_for_another_pass(toy: Path, call: str) -> None:
    def again(_: Progress) -> None:
        rig.run() if call == "run" else rig.pipeline.set_budget(10**11)

    with rigged(toy, progress=again) as rig, pytest.raises(ConfigError, match="runs inside a pass"):
        rig.run()
