"""One process that keeps one budget, or does not: loads a model, works, and prints its memory as JSON.

It imports nothing but the engine, so that any environment with the engine's dependencies can run it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

import pipeload
from pipeload.format import manifest
from pipeload.machine.memory import rss_bytes
from pipeload.planning.profile import ShardTimes

TEXTS = ["A man is eating food.", "The girl is carrying a baby."]
PROMPT = "The capital of France is"


def memory() -> dict[str, int]:
    """Bytes of this process: its peak, and its resident bytes now."""
    status = Path("/proc/self/status").read_text()
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
    found = {name: re.search(rf"{name}:\s*(\d+) kB", status) for name in names}
    return {name: int(match[1]) * 1024 for name, match in found.items() if match}


def work(model: pipeload.Model, task: str, size: int) -> Callable[[], object]:
    """One call of the task."""
    if task == "embed":
        return lambda: model.embed(TEXTS)
    if task == "generate":
        return lambda: model.generate(PROMPT, max_new_tokens=size)
    arrays = {
        spec.name: np.ones((1, size), spec.dtype) if spec.name != "token_type_ids" else np.zeros((1, size), spec.dtype)
        for spec in model.inputs
    }
    return lambda: model.run(arrays)


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("task", choices=("embed", "generate", "run"))
    parser.add_argument("budget", type=int)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--slow-cores", action="store_true", help="plan as if for slow cores and a fast disk")
    parser.add_argument("--fork", action="store_true")
    given = parser.parse_args()
    if given.fork:
        preload()
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        # The peak that a child starts with is its parent's.
        Path("/proc/self/clear_refs").write_text("5")
    profile = slow_cores(Path(given.directory)) if given.slow_cores else None
    with pipeload.load(given.directory, given.budget, threads=given.threads, profile=profile) as model:
        loaded = memory()
        first = model.plan
        call = work(model, given.task, given.size)
        faults: list[str] = []

        def calls() -> None:
            try:
                for _ in range(given.calls):
                    call()
            except Exception as error:  # noqa: BLE001 - it is told
                faults.append(f"{type(error).__name__}: {error}")

        if given.callers == 1:
            calls()
        else:
            threads = [threading.Thread(target=calls) for _ in range(given.callers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        plan = model.plan
        facts = {
            "budget_bytes": given.budget,
            "peak_bytes": memory()["VmHWM"],
            "loaded": loaded,
            "end": memory(),
            "passes": model.stats.passes,
            "last_pass_s": model.stats.last_pass_s,
            "faults": faults,
            "first_plan": figures(first),
            "plan": figures(plan),
        }
    print(json.dumps(facts), flush=True)
    if given.fork:
        os._exit(0)


def slow_cores(directory: Path) -> pipeload.Profile:
    """The profile of a machine on which four Loading Agents read and pack faster than the cores compute."""

    def times(nbytes: int) -> ShardTimes:
        run_s = 1e-3 + nbytes / 50e6
        return ShardTimes(session_s=1e-3, run_s=run_s, loading_run_s=run_s, pack_s=nbytes / 1e9, packed_run_s=run_s / 4)

    return pipeload.Profile(
        process_bytes=rss_bytes(),
        cores=2,
        read_bytes_per_s={1: 50e6, 2: 100e6, 4: 200e6},
        times={2: {shard.name: times(shard.nbytes) for shard in manifest.read(directory).shards}},
    )


def figures(plan: pipeload.Plan) -> dict[str, int]:
    """The figures of the plan."""
    names = ("process_bytes", "pass_bytes", "cache_bytes", "packing_bytes", "weights_bytes", "peak_bytes")
    return {name: getattr(plan, name) for name in names}


def preload() -> None:
    """Import the libraries that a server imports before it forks."""
    import onnxruntime
    import tokenizers

    import pipeload.model

    _ = onnxruntime, tokenizers, pipeload.model


if __name__ == "__main__":
    main()
