"""The processes of a cluster, started by the commands that users start them with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.engine.harness import PATIENCE_S, Background


class Cluster:
    """A scheduler and nodes. Leaving the context ends them.

    Attributes:
        address: the scheduler's.
        nodes: name -> process.
    """

    def __init__(self, models: Path, folder: Path, certificates: Path | None = None) -> None:
        self._models, self._folder, self.certificates = models, folder, certificates
        self.nodes: dict[str, subprocess.Popen[str]] = {}
        self.scheduler = self._begun("cluster", "start", "--port", "0")
        self.address = line(self.scheduler)

    def start(self, budgets: Mapping[str, str], *options: str, models: Path | None = None) -> None:
        """Start those of the nodes that do not run, and wait until the scheduler knows them."""
        missing = [name for name in budgets if name not in self.nodes or self.nodes[name].poll() is not None]
        for name in missing:
            self.nodes[name] = self._begun(*self._node(name, budgets[name], models), *options)
        for name in missing:
            line(self.nodes[name])

    def begun_program(self, program: str) -> subprocess.Popen[str]:
        """A program of Python in a process of its own, which waits for its standard input."""
        command = [sys.executable, "-c", program]
        return subprocess.Popen(
            command, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def kill(self, name: str) -> None:
        """End a node as a board ends whose power fails."""
        process = self.nodes.pop(name)
        process.kill()
        process.communicate(timeout=PATIENCE_S)

    def stop(self, name: str) -> None:
        """End a node as its user does."""
        process = self.nodes.pop(name)
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0

    def lose_scheduler(self) -> None:
        """End the scheduler as a machine ends whose power fails; its nodes end, too."""
        for process in (self.scheduler, *self.nodes.values()):
            if process is self.scheduler:
                process.kill()
            process.communicate(timeout=PATIENCE_S)
        self.nodes.clear()

    def start_scheduler(self) -> None:
        """Start it again, where it was."""
        self.scheduler = self._begun("cluster", "start", "--port", self.address.rpartition(":")[2])
        assert line(self.scheduler) == self.address

    def refused(self, name: str, budget: str, certificates: Path) -> str:
        """The error of a node that cannot join."""
        command = self._command(*self._node(name, budget), "--certificates", str(certificates))
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1
        return done.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.nodes.values(), self.scheduler):
            process.terminate()
        for process in (*self.nodes.values(), self.scheduler):
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()
            process.communicate()

    def _node(self, name: str, budget: str, models: Path | None = None) -> list[str]:
        folder = str(models or self._models)
        options = {"cluster": self.address, "name": name, "budget": budget, "models": folder}
        return ["node", *(word for option, value in options.items() for word in (f"--{option}", value))]

    def _begun(self, *words: str) -> subprocess.Popen[str]:
        more = ("--certificates", str(self.certificates)) if self.certificates else ()
        command = self._command(*words, *more)
        with open(self._folder / "log.txt", "a") as log:
            return subprocess.Popen(command, env=self._environment(), stdout=subprocess.PIPE, stderr=log, text=True)

    @staticmethod
    def _command(*words: str) -> list[str]:
        return [sys.executable, "-m", "pipeload", *words]

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PIPELOAD_CACHE": str(self._folder / "cache")}
        return os.environ | own


def line(process: subprocess.Popen[str]) -> str:
    """The line by which a process says that it is there. One that says nothing is killed."""
    assert process.stdout is not None
    reading = Background(process.stdout.readline)
    reading.join(PATIENCE_S)
    if reading.is_alive():
        process.kill()
    found = str(reading.end()).strip()
    assert found, f"the process ended with {process.wait(PATIENCE_S)}"
    return found
