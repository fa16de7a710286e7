"""Memory and disk of the engine that carries a cluster, and the time of a message through an actor of it.

python -m benchmarks.cluster.main                       Dask, as pipeload uses it; writes results/
python -m benchmarks.cluster.main --ray BIN/python      and Ray, in another environment
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "engines.json"
MESSAGE_BYTES = 100_000
ROUNDS = 300
_WARM = 30
_RAY = Path(__file__).with_name("by_ray.py")


class Echo:
    """An actor that sends back what it gets."""

    async def same(self, value: Any) -> Any:
        """The argument."""
        return value


def figures_of(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and the time that one in a hundred takes longer than, in milliseconds."""
    ordered = sorted(seconds)
    return {"p50_ms": ordered[len(ordered) // 2] * 1e3, "p99_ms": ordered[len(ordered) * 99 // 100] * 1e3}


def by_dask() -> dict[str, Any]:
    """A scheduler and two workers as processes, and a client here, on loopback without TLS."""
    import numpy as np
    import psutil
    from distributed import Client

    from pipeload.cluster.messages import Place, call

    script = (
        "import asyncio, sys, numpy; from distributed import Scheduler, Worker\n"
        "from pipeload.cluster import settings; settings.use()\n"
        "async def main():\n"
        "    if sys.argv[1] == 'scheduler':\n"
        "        made = await Scheduler(host='127.0.0.1', dashboard=False, dashboard_address='127.0.0.1:0')\n"
        "    else:\n"
        "        made = await Worker(sys.argv[1], nthreads=1, memory_limit=0, dashboard=False,\n"
        "            dashboard_address='127.0.0.1:0', local_directory=sys.argv[2])\n"
        "    print(made.address, flush=True)\n"
        "    await made.finished()\n"
        "asyncio.run(main())"
    )

    def started(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)

    with tempfile.TemporaryDirectory() as folder:
        begin_s = time.perf_counter()
        scheduler = started("scheduler")
        assert scheduler.stdout is not None
        address = scheduler.stdout.readline().strip()
        workers = [started(address, folder) for _ in range(2)]
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        start_s = time.perf_counter() - begin_s
        client = Client(address, set_as_default=False, direct_to_workers=True)
        try:
            where = next(iter(client.scheduler_info()["workers"]))
            actor = client.submit(Echo, actor=True, workers=[where])
            actor.result()
            place = Place(node="", address=where, key=actor.key)
            message = {"edge": np.zeros(MESSAGE_BYTES // 4, np.float32)}

            async def trips() -> list[float]:
                found = []
                for _ in range(_WARM + ROUNDS):
                    begin_s = time.perf_counter()
                    await call(client.rpc, place, "same", message)
                    found.append(time.perf_counter() - begin_s)
                return found[_WARM:]

            seconds = asyncio.run_coroutine_threadsafe(trips(), client.loop.asyncio_loop).result()
            memory = [psutil.Process(one.pid).memory_full_info().uss for one in (scheduler, *workers)]
        finally:
            client.close()
            for process in (*workers, scheduler):
                process.terminate()
                process.wait()
    return {
        "version": importlib.metadata.version("distributed"),
        "start_s": start_s,
        "worker_uss_bytes": memory[1:],
        "head_uss_bytes": memory[0],
        "disk_bytes": disk_bytes("distributed", "dask"),
        "round_trip": figures_of(seconds),
    }


def disk_bytes(*packages: str) -> int:
    """Bytes of packages and of those that they need, as pip lists their files."""
    wanted, seen = [*packages], set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        seen.add(name)
        for need in found.requires or ():
            if "extra ==" not in need:
                wanted.append(need.split(";")[0].split("[")[0].strip().split(" ")[0].rstrip("<>=!~0123456789.,"))
    return sum(
        path.stat().st_size
        for name in seen
        for file in importlib.metadata.files(name) or ()
        if (path := Path(str(file.locate()))).is_file()
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster.main")
    parser.add_argument("--ray", metavar="PYTHON", help="an interpreter that has Ray")
    parser.add_argument("-o", metavar="FILE", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args(arguments)
    found = {"cores": os.cpu_count(), "message_bytes": MESSAGE_BYTES, "rounds": ROUNDS, "dask": by_dask()}
    if given.ray:
        done = subprocess.run(
            [given.ray, str(_RAY), str(MESSAGE_BYTES), str(ROUNDS)], stdout=subprocess.PIPE, check=True
        )
        found["ray"] = json.loads(done.stdout.splitlines()[-1])
    given.o.parent.mkdir(exist_ok=True)
    given.o.write_text(json.dumps(found, indent=1) + "\n")
    print(given.o.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
