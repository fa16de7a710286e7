"""Child processes of the rows: a worker that takes orders, and the commands of pipeload."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

from tests.models import REPOSITORY

__all__ = ["PATIENCE_S", "Ended", "Told", "Worker", "environment", "run_command"]

PATIENCE_S = int(os.environ.get("PIPELOAD_TEST_PATIENCE_S", "900"))
"""How long anything may take before it counts as a hang."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker answered to an order.

    Attributes:
        result: of the call; None where it failed.
        error: class and message of pipeload's error; empty without one.
        needed_bytes: that a BudgetError names.
    """

    result: Any = None
    error: tuple[str, str] | tuple[()] = ()
    needed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, and its output."""

    code: int
    stdout: str
    stderr: str


class HangError(AssertionError):
    """A process has given no answer for a long time."""


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with the import path of this tree, and with changes; None removes a variable."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in (changes or {}).items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    return found


def run_command(
    *arguments: object,
    changes: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
    command: Sequence[str] = (),
) -> Ended:
    """Run `pipeload ARGUMENTS` to its end.

    Args:
        arguments: of the command.
        changes: of its environment; None removes a variable.
        before: called in the process before its program begins.
        command: a program that becomes the interpreter.
    """
    process = subprocess.Popen(
        [*command, sys.executable, "-W", "ignore", "-m", "pipeload", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(changes),
        preexec_fn=before,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise HangError(f"pipeload {' '.join(map(str, arguments))} hangs") from None
    return Ended(process.returncode, stdout, stderr)


class Worker:
    """A process that uses models as it is told. A context, which ends it.

    Args:
        changes: of its environment.
        command: comes before the interpreter's, such as a shell that enters a cgroup.
    """

    def __init__(self, changes: Mapping[str, str | None] | None = None, command: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, "-W", "ignore", "-m", "tests.system.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env=environment(changes),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def send(self, do: str, **order: Any) -> None:
        """Give an order, and do not wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Told:
        """The answer to the oldest order that has none.

        Raises:
            AssertionError: the process has ended, or hangs.
        """
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        if not ready:
            self._hangs()
        line = self.process.stdout.readline()
        if not line:
            ended = self.end()
            raise AssertionError(f"the worker ended with {ended.code}: {ended.stderr[-2000:]}")
        told = json.loads(line)
        return Told(told.get("result"), tuple(told.get("error", ())), told.get("needed", 0))

    def ask(self, do: str, **order: Any) -> Told:
        """Give an order, and wait for its answer."""
        self.send(do, **order)
        return self.answer()

    def end(self) -> Ended:
        """Let it close its model and end."""
        try:
            stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._hangs()
        return Ended(self.process.returncode, stdout.decode(), stderr.decode(errors="replace"))

    def _hangs(self) -> NoReturn:
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        self.process.kill()
        _, stderr = self.process.communicate()
        raise HangError(f"the worker hangs: {stderr.decode(errors='replace')}")
