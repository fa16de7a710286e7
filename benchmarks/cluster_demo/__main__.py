"""`make cluster-demo`: three nodes of unequal budgets on this machine run two real models together.

The models are exported if they are missing. Each node is a process in a memory cgroup of its own, where this user may
make one. Placements and answers are printed, and compared with those of one process that has all memory; the exit code
is 0 if all of them are right and no node had more memory than its budget.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

import pipeload
from benchmarks.models import exported
from pipeload.bench import cgroup
from pipeload.cli.commands.cluster import placement_facts
from pipeload.cluster.connection import Connection
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.example_inputs import example_inputs
from pipeload.planning.needs import planning_dims

BUDGETS_MB = {"small": 420, "middle": 560, "large": 700}
_BESIDE_BYTES = 6_000_000
"""The kernel charges it to a cgroup beside the memory of its processes."""
_PROMPTS = ("The capital of France is", "Water boils at")
_TOKENS = 16


def main() -> int:
    """Run the demo; the exit code."""
    console = Console(width=160, highlight=False)
    bert, smollm = (exported(name, console)[0] for name in ("bert-large", "smollm2-135m"))
    refusal = cgroup.permitted()
    console.print(f"Nodes {'without memory cgroups: ' + refusal if refusal else 'in memory cgroups'} of {_budgets()}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeload-cluster-demo-")))
        models = folder / "models"
        models.mkdir()
        for directory in (bert, smollm):
            (models / directory.name).symlink_to(directory.resolve())
        scheduler = stack.enter_context(_started(["cluster", "start", "--port", "0"], None))
        address = _line(scheduler)
        nodes = {
            name: stack.enter_context(
                _started(
                    ["node", "--cluster", address, "--name", name, "--budget", f"{size}MB", "--models", str(models)],
                    size * 1_000_000 + _BESIDE_BYTES if refusal is None else None,
                )
            )
            for name, size in BUDGETS_MB.items()
        }
        for node in nodes.values():
            _line(node)
        connection = stack.enter_context(pipeload.connect(address))
        right = [_passes(connection, bert, console), _texts(connection, smollm, console)]
        right += [_peak(name, node, console) for name, node in nodes.items()]
    console.print("all right" if all(right) else "NOT right")
    return 0 if all(right) else 1


def _passes(connection: Connection, directory: Path, console: Console) -> bool:
    with connection.load(directory.name, latency_share=0.0) as model:
        _show(connection, directory, console)
        inputs = example_inputs(model.manifest, planning_dims(model.manifest))
        begin_s = time.perf_counter()
        made = model.run(inputs)
        first_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        many = list(model.run_many([inputs] * 6))
        each_s = (time.perf_counter() - begin_s) / 6
    with pipeload.load(directory) as alone:
        expected = alone.run(inputs)
    error = max(_difference(one, expected) for one in (made, *many))
    console.print(
        f"  first pass {first_s:.2f} s, then {each_s:.2f} s each; at most {error:.1e} off one machine's answer"
    )
    return error < 1e-4


def _texts(connection: Connection, directory: Path, console: Console) -> bool:
    options = {"max_new_tokens": _TOKENS}
    with connection.load(directory.name, latency_share=0.0) as model:
        _show(connection, directory, console)
        begin_s = time.perf_counter()
        made = [model.generate(prompt, **options) for prompt in _PROMPTS]
        seconds = time.perf_counter() - begin_s
    with pipeload.load(directory) as alone:
        expected = [alone.generate(prompt, **options) for prompt in _PROMPTS]
    for prompt, one in zip(_PROMPTS, made, strict=True):
        console.print(f"  {prompt}[bold]{one.text!r}[/bold]")
    equal = [one.token_ids for one in made] == [one.token_ids for one in expected]
    console.print(
        f"  {seconds / sum(len(one.token_ids) for one in made) * 1e3:.0f} ms a token; the tokens are "
        f"{'those' if equal else 'NOT those'} of one machine"
    )
    return equal


def _show(connection: Connection, directory: Path, console: Console) -> None:
    facts = placement_facts(connection.manifest(directory.name), connection.plan(directory.name, latency_share=0.0))
    console.print(f"\n{directory.name}, placed for throughput; predicted {facts['passes_per_s']:.1f} passes/s:")
    for one in facts["stages"]:
        console.print(
            f"  {one['node']:8} {one['shards']:28} computing {one['run_s'] * 1e3:.0f} ms, "
            f"reading {one['read_s'] * 1e3:.0f} ms, sending {one['send_s'] * 1e3:.1f} ms"
        )


def _peak(name: str, node: cgroup.Started, console: Console) -> bool:
    peak_bytes = node.peak_bytes()
    if peak_bytes is None:
        return True
    budget_bytes = BUDGETS_MB[name] * 1_000_000
    console.print(f"  {name}: at most {format_bytes(peak_bytes)} of {format_bytes(budget_bytes)}")
    return peak_bytes <= budget_bytes + _BESIDE_BYTES


def _difference(made: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(made[name] - array).max() / (np.ptp(array) or 1.0)) for name, array in expected.items())


def _started(words: Sequence[str], memory_bytes: int | None) -> AbstractContextManager[cgroup.Started]:
    command = [sys.executable, "-m", "pipeload", *words]
    return cgroup.started(command, memory_bytes=memory_bytes, grouped=bool(memory_bytes))


def _line(process: cgroup.Started) -> str:
    """The line by which a process says that it is there."""
    assert process.process.stdout is not None
    line = process.process.stdout.readline().strip()
    if not line:
        raise SystemExit("a process of the cluster could not start")
    return str(line)


def _budgets() -> str:
    return ", ".join(f"{size} MB" for size in BUDGETS_MB.values())


if __name__ == "__main__":
    sys.exit(main())
