"""The same figures of Ray, in an environment of its own: python by_ray.py BYTES ROUNDS prints them as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_WARM = 30


def main(message_bytes: int, rounds: int) -> dict[str, Any]:
    import numpy as np
    import psutil
    import ray

    begin_s = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)

    @ray.remote
    class Echo:
        def same(self, value: Any) -> Any:
            return value

    actor = Echo.remote()
    message = np.zeros(message_bytes // 4, np.float32)
    ray.get(actor.same.remote(message))
    start_s = time.perf_counter() - begin_s
    seconds = []
    for _ in range(_WARM + rounds):
        begin_s = time.perf_counter()
        ray.get(actor.same.remote(message))
        seconds.append(time.perf_counter() - begin_s)
    seconds = sorted(seconds[_WARM:])
    memory: dict[str, int] = {}
    for process in psutil.Process(os.getpid()).children(recursive=True):
        name = " ".join(process.cmdline())
        kind = next(
            (
                kind
                for mark, kind in (
                    ("gcs_server", "head"),
                    ("dashboard/dashboard.py", "head"),
                    ("monitor.py", "head_or_log"),
                    ("raylet/raylet", "raylet"),
                    ("agent", "agents"),
                    ("ray::Echo", "actor"),
                    ("ray::IDLE", "idle_workers"),
                )
                if mark in name
            ),
            "other",
        )
        memory[kind] = memory.get(kind, 0) + process.memory_full_info().uss
    files = importlib.metadata.files("ray") or ()
    disk = sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())
    ray.shutdown()
    return {
        "version": ray.__version__,
        "start_s": start_s,
        "uss_bytes": memory,
        "disk_bytes": disk,
        "round_trip": {"p50_ms": seconds[len(seconds) // 2] * 1e3, "p99_ms": seconds[len(seconds) * 99 // 100] * 1e3},
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
