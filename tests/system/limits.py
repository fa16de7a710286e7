"""Limits of the system at descending values: address space, descriptors, processes and threads."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.system.processes import Worker, run_command
from tests.system.rows import Finding, Row, judge, one_error, tiny

__all__ = ["ROWS"]

_OTHER = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
)
"""Another user, who may read all files: root has no limit of processes."""


def _command(name: str, values: tuple[int, ...]) -> Callable[[Path], Finding]:
    """`pipeload run` under each value, from a generous one down to one that stops the interpreter."""

    def make(place: Path) -> Finding:
        found, number = Finding(), getattr(resource, f"RLIMIT_{name}")
        for value in values:
            found.runs += 1

            def limit(value: int = value) -> None:
                resource.setrlimit(number, (value, value))

            ended = run_command(
                "run",
                tiny("bert"),
                "--random",
                "--budget",
                "1GB",
                changes={"PIPELOAD_CACHE": str(place / "cache")},
                before=limit,
            )
            good = one_error(found, ended, f"{name} {value}")
            found.expect(good or value != values[0], f"{name} {value}: it fails: {ended.stderr[-300:]}")
        return found

    return make


def _loaded(name: str, values: Sequence[int], *, beside: str | None = None) -> Callable[[Path], Finding]:
    """The limit is set in a process whose libraries are there, before it loads a model; then it is lifted.

    Args:
        name: of the limit.
        values: for it.
        beside: the fact of the process that is added to each value; None for none.
    """

    def make(place: Path) -> Finding:
        found = Finding()
        with Worker({"PIPELOAD_CACHE": str(place / "cache")}) as worker:
            directory = str(tiny("llama"))
            # Weights of all sizes come and go, so that no run meets less than the first one.
            worker.ask("load", directory=directory, budget="1GB")
            expected = worker.ask("call", task="generate").result
            worker.ask("close")
            most = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
            for value in values:
                found.runs += 1
                words = f"{name} {value}" if beside is None else f"{name} {value} beside what is there"
                there = 0 if beside is None else worker.ask("facts").result[beside]
                worker.ask("limit", name=name, value=there + value)
                told = worker.ask("load", directory=directory, budget="1GB")
                if told.error:
                    judge(found, told, [], words)
                else:
                    judge(found, worker.ask("call", task="generate"), expected, words)
                worker.ask("close")
                worker.ask("limit", name=name, value=most)
                told = worker.ask("load", directory=directory, budget="1GB")
                found.expect(not told.error, f"{words}, afterwards: {told.error}")
                if not told.error:
                    after = judge(found, worker.ask("call", task="generate"), expected, f"{words}, afterwards")
                    found.expect(after, f"{words}: no answer afterwards")
                worker.ask("close")
            ended = worker.end()
            found.expect(ended.code == 0 and not ended.stderr, f"the end: {ended.code} {ended.stderr[-300:]}")
        return found

    return make


def _threads(place: Path) -> Finding:
    """A user who may have fewer and fewer processes and threads."""
    found = Finding()
    place.chmod(0o777)
    for value in (60, 30, 20, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2):
        found.runs += 1

        def limit(value: int = value) -> None:
            resource.setrlimit(resource.RLIMIT_NPROC, (value, value))

        arguments = ("run", tiny("bert"), "--random", "--budget", "1GB")
        ended = run_command(*arguments, changes={"PIPELOAD_CACHE": str(place / "cache")}, before=limit, command=_OTHER)
        good = one_error(found, ended, f"NPROC {value}")
        found.expect(good or value < 60, f"NPROC {value}: it fails: {ended.stderr[-300:]}")
    return found


def _lacks_users() -> str | None:
    if os.geteuid() != 0 or shutil.which(_OTHER[0]) is None:
        return "needs the right to become another user, and setpriv"
    done = subprocess.run([*_OTHER, sys.executable, "-c", ""], capture_output=True)
    return f"setpriv: {done.stderr.decode().strip()}" if done.returncode else None


_ONE = "right answers, or one error (below 400 MB the C library's own) without a traceback; no hang"
ROWS = (
    Row(
        name="as",
        fault="RLIMIT_AS of a command, from 4 GB down",
        outcome=_ONE,
        recovered="the next command works",
        make=_command(
            "AS",
            (
                4 << 30,
                2 << 30,
                1400 << 20,
                1 << 30,
                800 << 20,
                640 << 20,
                512 << 20,
                400 << 20,
                300 << 20,
                200 << 20,
                128 << 20,
            ),
        ),
        slow=True,
    ),
    Row(
        name="nofile",
        fault="RLIMIT_NOFILE of a command, from 64 down",
        outcome=_ONE,
        recovered="the next command works",
        make=_command("NOFILE", (64, 32, 20, 16, 14, 12, 11, 10, 9, 8, 7, 6, 5)),
        slow=True,
    ),
    Row(
        name="nproc",
        fault="RLIMIT_NPROC of a command, from 60 down",
        outcome=_ONE,
        recovered="the next command works",
        make=_threads,
        lacks=_lacks_users,
        slow=True,
    ),
    Row(
        name="nofile-loaded",
        fault="RLIMIT_NOFILE falls before a model is loaded, from 30 down",
        outcome="right answers, or a PipeloadError with the reason",
        recovered="right answers when the limit is lifted",
        make=_loaded("NOFILE", (30, 16, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3)),
    ),
    Row(
        name="as-loaded",
        fault="RLIMIT_AS leaves 400 MB and less when a model is loaded",
        outcome="right answers, or a PipeloadError with the reason",
        recovered="right answers when the limit is lifted",
        make=_loaded(
            "AS", [more << 20 for more in (400, 200, 100, 60, 40, 30, 24, 20, *range(16, -1, -1))], beside="space"
        ),
        slow=True,
    ),
)
