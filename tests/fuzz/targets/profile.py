"""Files of profiles: what was measured is read back, and the planner can use all that is taken."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.measuring import profile_store
from pipeload.planning.profile import Profile, ShardTimes

_TIMES = ShardTimes(session_s=1e-3, run_s=2e-3, loading_run_s=3e-3, pack_s=4e-3, packed_run_s=1e-3)
_PROFILE = Profile(
    process_bytes=1,
    cores=2,
    read_bytes_per_s={1: 1e9, 2: 1.5e9},
    cached_read_bytes_per_s={1: 9e8},
    read_bytes_per_s_by_request={4096: 1e8},
    dims={"batch_size": 1, "sequence_length": 128},
    times={2: {"prologue": _TIMES, "block.000": _TIMES}},
    runtime_bytes=20_000_000,
    activation_bytes=3,
    cache_bytes_per_token=100,
)


def _seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        identity = profile_store.Identity(
            architecture="x86_64", cpu="c", cores=2, memory_bytes=1, device="1:2", read_limits="",
            software={"numpy": "2"}, model="0" * 64, dims={"batch_size": 1},
        )  # fmt: skip
        profile_store.write(_PROFILE, Path(folder) / "p", identity)
        return (Path(folder) / "p").read_bytes()


def _prepare() -> Trial:
    folder = Path(tempfile.mkdtemp())
    path, again = folder / "p", folder / "again"

    def trial(data: bytes) -> bool:
        path.write_bytes(data)
        found = profile_store.read(path)
        profile_store.write(found, again)
        if replace(profile_store.read(again), process_bytes=0) != replace(found, process_bytes=0):
            raise Wrong("what is written of it reads as something else")
        for bandwidth in (found.read_bytes_per_s, found.cached_read_bytes_per_s):
            if any(not 0 < value < float("inf") or agents < 1 for agents, value in bandwidth.items()):
                raise Wrong("a bandwidth is none", bandwidth)
        return True

    return trial


TARGETS = (
    Target(
        name="profile", what="files of profiles", prepare=_prepare, seeds=lambda: [_seed()], mutate=json_of, share=0.5
    ),
)
