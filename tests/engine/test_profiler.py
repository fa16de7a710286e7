"""The process and the machine as they are now."""

from __future__ import annotations

from pipeload.profiler import measure


def test_the_machine_is_measured() -> None:
    profile = measure()
    assert profile.cores >= 1
    assert profile.process_bytes > 10_000_000
    assert not profile.measured
