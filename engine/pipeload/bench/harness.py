"""Contenders x budgets x disks x rounds: each run in a process of its own, under its limits, its answers checked.

```
reference:   single, without limits -> outputs; pipeload once, which remembers the files that it verified
per round:   disk 1:  profile under the throttle -> T*
                      budget 1:  pipeload  single  mmap ...      interleaved, so that a slow minute of the
                      budget 2:  pipeload  single  mmap ...      machine does not meet one contender alone
             disk 2:  ...
```
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from pipeload.bench import cgroup
from pipeload.bench.bound import Bounds, Order, Profiles, bounds
from pipeload.bench.launch import child_environment, run_contender
from pipeload.bench.machine import machine_facts
from pipeload.bench.record import Job, Record, Run, max_error, summarise
from pipeload.bench.spec import ContenderName, Spec, Task, Unsplit, from_json, to_json
from pipeload.bench.workload import input_dims
from pipeload.errors import RunError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.profile_store import write as write_profile
from pipeload.notify import Notify

__all__ = ["Report", "Settings", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a comparison.

    Attributes:
        directory: the sharded model directory.
        unsplit: the same model as one graph.
        contenders: their names.
        budgets: memory limits in bytes; None for no limit.
        disks: bytes per second to which reads are throttled; None for no throttle.
        settling: passes of pipeload after the first that do not count, while it packs and learns. Other contenders
            settle in one pass, but decode as many tokens.
        passes: the number of steady passes of each run after those.
        rounds: the number of runs of each contender in each setting.
        sizes: sizes of symbolic dimensions; without it batch 1 and 128 tokens, or one image.
        threads: intra-op threads of every contender; None takes every core, or lets pipeload choose.
        loaders: numbers of Loading Agents to try pipeload with; empty lets it choose.
        cold: evict the weights from the page cache before every pass, as when other models ran in between.
        timeout_s: a run that takes longer is ended, and has no result.
    """

    directory: Path
    unsplit: Unsplit
    contenders: tuple[ContenderName, ...]
    budgets: tuple[int | None, ...]
    disks: tuple[int | None, ...] = (None,)
    settling: int = 5
    passes: int = 5
    rounds: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    threads: int | None = None
    loaders: tuple[int, ...] = ()
    cold: bool = False
    timeout_s: float = 3600

    def settling_of(self, contender: ContenderName, *, decodes: bool) -> int:
        """The passes after the first that do not count for a contender, which decodes a token in each or not."""
        return self.settling if contender == "pipeload" or decodes else min(1, self.settling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results of a comparison.

    Attributes:
        machine: the facts about the machine.
        settings: the settings of the comparison.
        records: one for each contender in each setting.
        runs: each record's runs, with their memory over time.
        refusal: the reason for missing cgroups; None if cgroups were used.
    """

    machine: dict[str, Any]
    settings: Settings
    records: tuple[Record, ...]
    runs: tuple[tuple[Run, ...], ...]
    refusal: str | None

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        path.write_bytes(msgspec.json.format(to_json(self), indent=1) + b"\n")


def compare(settings: Settings, progress: Notify | None = None, warn: Callable[[str], None] | None = None) -> Report:
    """Run every contender in every setting, and check every answer.

    Args:
        settings: the contenders, and their settings.
        progress: called with the name of the current step, the part done, and the whole.
        warn: called with a message about each measurement that is impossible here.

    Raises:
        ConfigError: the disk cannot be throttled.
        RunError: the reference did not run.
    """
    notify = progress or (lambda *_: None)
    manifest = manifests.read(settings.directory)
    refusal = cgroup.permitted()
    if refusal and warn:
        warn(
            f"No cgroups: {refusal}. Memory is not capped and the disk is not throttled; budgets are kept by pipeload "
            "alone, and peaks are of the process (RSS), without page cache."
        )
    disks: tuple[int | None, ...] = settings.disks if refusal is None else (None,)
    jobs = _jobs(settings, disks, capped=refusal is None)
    runs: dict[Job, list[Run]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(prefix="pipeload-bench-") as folder:
        bench = _Bench(settings, manifest, Path(folder), grouped=refusal is None)
        notify("Running the reference", 0, 0)
        bench.run_reference()
        profiles: dict[int | None, list[Profiles]] = {disk: [] for disk in disks}
        rounds = [(disk, [job for job in jobs if job.disk_bytes_per_s == disk]) for disk in disks] * settings.rounds
        done, total = 0, settings.rounds * len(jobs)
        for disk, at_disk in rounds:
            notify(f"Profiling, {_disk_name(disk)}", done, total)
            profiles[disk].append(bench.profile(disk))
            for job in at_disk:
                notify("Comparing", done, total)
                # A contender that was killed or refused once would be again.
                if all(run.result is not None and run.result.error is None for run in runs[job]):
                    runs[job].append(bench.run(job))
                done += 1
        notify("Comparing", total, total)
    records = []
    for job in jobs:
        limits = _bounds(manifest, profiles[job.disk_bytes_per_s], job, runs)
        records.append(summarise(settings.directory.name, job, runs[job], limits))
    return Report(
        machine=machine_facts(),
        settings=settings,
        records=tuple(records),
        runs=tuple(tuple(runs[job]) for job in jobs),
        refusal=refusal,
    )


class _Bench:
    """One comparison: its files, and the orders to its children."""

    def __init__(self, settings: Settings, manifest: Manifest, folder: Path, *, grouped: bool) -> None:
        self._settings = settings
        self._folder = folder
        self._grouped = grouped
        self._dims = input_dims(manifest, settings.directory, settings.sizes)
        self._task: Task = "decode" if manifest.caches else "pass"
        self._reference = folder / "reference.npz"
        self._cache = folder / "cache"
        self._profiles: dict[int | None, Path] = {}

    def run_reference(self) -> None:
        spec = self._spec(Job(contender="single", budget_bytes=None, disk_bytes_per_s=None), self._reference)
        run = run_contender(spec, grouped=self._grouped, timeout_s=self._settings.timeout_s)
        if run.result is None or run.result.error:
            raise RunError(
                f"The reference, {spec.directory.name} in one session without a limit, did not run: "
                f"{run.message or (run.result and run.result.error)} Answers cannot be checked without it."
            )
        if "pipeload" in self._settings.contenders:
            # Only the first start on a machine hashes the files: the runs that count are later ones.
            job = Job(contender="pipeload", budget_bytes=None, disk_bytes_per_s=None)
            run_contender(
                replace(self._spec(job, self._folder / "outputs.npz"), settling=0, passes=1),
                grouped=self._grouped,
                timeout_s=self._settings.timeout_s,
                cache=self._cache,
            )

    def profile(self, disk: int | None) -> Profiles:
        path, target = self._folder / "order.json", self._folder / "profile.json"
        settings = self._settings
        order = Order(directory=settings.directory, dims=self._dims, threads=settings.threads, target=target)
        path.write_bytes(to_json(order))
        outcome = cgroup.run(
            [sys.executable, "-m", "pipeload.bench.bound", str(path)],
            read_bytes_per_s=disk,
            disk_of=self._settings.directory,
            grouped=self._grouped,
            timeout_s=self._settings.timeout_s,
            env=child_environment(self._cache),
        )
        if outcome.returncode:
            raise RunError(f"The model could not be profiled: {(outcome.stderr.strip().splitlines() or [''])[-1]}")
        measured = from_json(target.read_bytes(), Profiles)
        self._profiles[disk] = self._folder / f"profile-{disk}.json"
        write_profile(measured.steady, self._profiles[disk])
        return measured

    def run(self, job: Job) -> Run:
        outputs = self._folder / "outputs.npz"
        outputs.unlink(missing_ok=True)
        run = run_contender(
            self._spec(job, outputs),
            memory_bytes=job.budget_bytes,
            read_bytes_per_s=job.disk_bytes_per_s,
            grouped=self._grouped,
            timeout_s=self._settings.timeout_s,
            cache=self._cache,
        )
        if not outputs.exists():
            return run
        return replace(run, error=max_error(self._reference, outputs))

    def _spec(self, job: Job, outputs: Path) -> Spec:
        return Spec(
            contender=job.contender,
            directory=self._settings.directory,
            unsplit=self._settings.unsplit,
            task=self._task,
            # In a cgroup pipeload finds the limit itself; a number would limit the RSS, and the cgroup may be charged
            # less.
            budget="auto" if job.budget_bytes is None or self._grouped else job.budget_bytes,
            profile=self._profiles.get(job.disk_bytes_per_s),
            loaders=job.loaders,
            threads=self._settings.threads,
            settling=self._settings.settling_of(job.contender, decodes=self._task == "decode"),
            passes=self._settings.passes,
            cold=self._settings.cold,
            sizes=dict(self._settings.sizes),
            outputs=outputs,
        )


def _jobs(settings: Settings, disks: Sequence[int | None], *, capped: bool) -> list[Job]:
    """All jobs in running order. Without caps no budget limits the others: they run once, like unlimited `single`."""
    jobs: dict[Job, None] = {}
    for disk in disks:
        if "single" in settings.contenders:
            jobs[Job(contender="single", budget_bytes=None, disk_bytes_per_s=disk)] = None
        for budget in settings.budgets:
            for contender in settings.contenders:
                for loaders in settings.loaders if contender == "pipeload" and settings.loaders else (None,):
                    cap = budget if capped or contender == "pipeload" else None
                    jobs[Job(contender=contender, budget_bytes=cap, disk_bytes_per_s=disk, loaders=loaders)] = None
    return list(jobs)


def _bounds(manifest: Manifest, profiles: Sequence[Profiles], job: Job, runs: Mapping[Job, Sequence[Run]]) -> Bounds:
    """T* with the weights that pipeload keeps in this setting (all of them without a limit): the median of rounds."""
    resident_bytes = _resident_bytes(manifest, job, runs)
    found = [bounds(manifest, each, resident_bytes) for each in profiles]
    return Bounds(first_s=median(each.first_s for each in found), steady_s=median(each.steady_s for each in found))


def _resident_bytes(manifest: Manifest, job: Job, runs: Mapping[Job, Sequence[Run]]) -> int:
    if job.contender == "single" and job.budget_bytes is None:
        return manifest.weight_bytes
    same = [
        run.result.plan.resident_bytes
        for other, found in runs.items()
        if (other.budget_bytes, other.disk_bytes_per_s) == (job.budget_bytes, job.disk_bytes_per_s)
        and job.loaders in (None, other.loaders)
        for run in found
        if run.result is not None and run.result.plan is not None
    ]
    return max(same, default=0)


def _disk_name(disk: int | None) -> str:
    return "disk not throttled" if disk is None else f"disk at {format_bytes(disk)}/s"
