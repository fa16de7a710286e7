"""Faults put into the modules where a wrong line costs most, one at a time: does a test see each of them?

    python -m tests.proof.mutants                       all modules
    python -m tests.proof.mutants pipeline/exchange.py  one of them
    python -m tests.proof.mutants --again               those that no earlier run has killed (build/mutants has them)
    python -m tests.proof.mutants --again --keep        the same, and keeps the counts in docs/reliability.md

The counts of modules that are not named stay as they were kept.

A mutant is a module with one small fault (`mutations.py`). The module's tests are collected once; for each mutant a
forked process puts its code into the module, and runs them. It is *killed* when a test fails, *timed out* when the
tests twice take five times as long as in the last fork without a fault. One that passes has *survived*; a fault outside
of functions is tried once more by a new process that imports it in the place of the module, since there a fork cannot
tell. Survivors are explained in mutants.md, by their lines; one that is not makes the command fail. So does a fork
without a fault that fails: one of 20 has none.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import hypothesis
import msgspec
import pytest
from _pytest.main import pytest_runtestloop as run_tests
from tests.proof.counts import Line, keep, kept
from tests.proof.mutations import Mutant, mutants_of

_ROOT = Path(__file__).resolve().parents[2]
_ENGINE = _ROOT / "engine" / "pipeload"
_EXPLAINED = Path(__file__).with_name("mutants.md")
_PATIENCE_S = 15
"""How long a wait in a test of a mutant may take."""
_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR = 60.0, 5.0
_CONTROL_EVERY, _CONTROL_TIMEOUT_S, _TOLD_EVERY = 20, 600.0, 50

TESTS = {
    "pipeline/reservations.py": ["pipeline/test_reservations.py"],
    "pipeline/exchange.py": ["pipeline/test_exchange*.py"],
    "pipeline/requests.py": ["pipeline/test_requests.py", "pipeline/test_exchange*.py"],
    "pipeline/residents.py": ["pipeline/test_residents.py", "pipeline/test_exchange*.py"],
    "planning/planner.py": ["planning/test_planner_figures.py", "planning/test_planner.py"],
    "planning/layouts.py": [
        "planning/test_layouts.py",
        "planning/test_planner_figures.py",
        "planning/test_shared_weights.py",
        "planning/test_fewer_sessions.py",
        "planning/test_planner.py",
    ],
    "planning/schedule.py": ["planning/test_schedule.py", "planning/test_fewer_sessions.py", "planning/test_cores.py"],
}
"""Module -> the tests that state its rules, below tests/engine."""


class Outcome(IntEnum):
    """What the tests say of a mutant."""

    SURVIVED = 0
    KILLED = 1
    TIMED_OUT = 2


def main() -> None:
    """Try the mutants of the named modules, print the survivors, and keep the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--again", action="store_true", help="leave out the mutants that earlier runs have killed")
    parser.add_argument("--keep", action="store_true", help="keep the counts in docs/reliability.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--with", type=Path, metavar="FILE", help="run the tests with this text in the module's place")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - TESTS.keys():
        parser.error(f"has no tests for {', '.join(sorted(unknown))}: choose from {', '.join(TESTS)}")
    modules, mutated = arguments.modules or list(TESTS), vars(arguments)["with"]
    if mutated is not None:
        sys.exit(_run_with(modules[0], mutated.read_text()))
    failures = 0
    for module in modules:
        records = _Records(module, again=arguments.again)
        line = _try_module(module, records, arguments.workers)
        failures += line.failures
        if arguments.keep:
            _keep(line, records.seconds)
    if failures:
        sys.exit(
            f"{_EXPLAINED.relative_to(_ROOT)} does not explain all survivors: state the rules they break in tests."
        )


def _keep(line: Line, seconds: float) -> None:
    """Keep the counts of a module, beside those of the others."""
    before = kept("mutants")
    lines = {one.fault: one for one in before.lines} if before else {}
    lines[line.fault] = line
    total = seconds + (before.seconds if before else 0.0)
    keep("mutants", "make mutants", total, [lines[name] for name in map(_fault, TESTS) if name in lines])


class _Records:
    """Outcomes of a module's mutants, kept in build/mutants from one run to the next, and how long they took."""

    def __init__(self, module: str, *, again: bool) -> None:
        self._path = _ROOT / "build" / "mutants" / f"{_name(module)}.json"
        self.seconds, self.outcomes = 0.0, {}
        if again and self._path.exists():
            self.seconds, self.outcomes = msgspec.json.decode(
                self._path.read_bytes(), type=tuple[float, dict[str, Outcome]]
            )

    def outcome(self, mutant: Mutant) -> Outcome:
        """That of an earlier run; SURVIVED of one that was not tried."""
        return self.outcomes.get(_key(mutant), Outcome.SURVIVED)

    def add(self, mutant: Mutant, outcome: Outcome, seconds: float) -> None:
        self.outcomes[_key(mutant)] = outcome
        self.seconds += seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.encode((self.seconds, self.outcomes)))


def _key(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.source.encode()).hexdigest()


def _try_module(module: str, records: _Records, workers: int) -> Line:
    source = (_ENGINE / module).read_text()
    mutants = mutants_of(source)
    left = [mutant for mutant in mutants if records.outcome(mutant) is Outcome.SURVIVED]
    print(f"{module}: {len(mutants)} mutants, {len(left)} of them to try", flush=True)
    if left:
        trial = _Trial(module, source, left, records, workers)
        if _run_pytest(module, [trial]) != pytest.ExitCode.OK or not trial.ended:
            sys.exit(f"The tests of {module} do not run without a mutant.")
    explained, unexplained = _explained(module), 0
    for mutant in mutants:
        if records.outcome(mutant) is Outcome.SURVIVED:
            known = (mutant.before, mutant.after) in explained
            unexplained += not known
            print(f"  {'explained' if known else 'SURVIVED'} {module}:{mutant.line}")
            print(f"    `{mutant.before}` -> `{mutant.after}`")
    counts = Counter(map(records.outcome, mutants))
    killed, survived, timed_out = (counts[kind] for kind in (Outcome.KILLED, Outcome.SURVIVED, Outcome.TIMED_OUT))
    print(f"{module}: {killed} killed, {timed_out} timed out, {survived} survived, {unexplained} of them not explained")
    return Line(
        fault=_fault(module),
        outcome=f"{killed:,} make a test fail, {timed_out:,} make the tests hang",
        recovered=f"{survived - unexplained:,} survive and are explained",
        runs=len(mutants),
        failures=unexplained,
    )


class _Trial:
    """A plugin of pytest: runs the collected tests once for each mutant, in forks, and once without."""

    def __init__(self, module: str, source: str, mutants: Sequence[Mutant], records: _Records, workers: int) -> None:
        self.ended = False
        self._module, self._source, self._mutants, self._workers = module, source, mutants, workers
        self._records = records
        self._running: dict[int, tuple[int | None, float]] = {}
        self._tried, self._alive, self._late = 0, list[Mutant](), list[int]()
        self._timeout_s, self._told_s = _LEAST_TIMEOUT_S, time.perf_counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            raise session.Failed("The tests cannot be collected.")
        self._start(session, None)
        self._collect(0)
        for number in range(len(self._mutants)):
            if number % _CONTROL_EVERY == 0:
                self._start(session, None)
            self._start(session, number)
        self._collect(0)
        # Other work on the machine may have been the reason: once more, each beside a run without a mutant.
        again, self._late = self._late, []
        for number in again:
            self._start(session, None)
            self._start(session, number)
        self._collect(0)
        for number in self._late:
            self._record(self._mutants[number], Outcome.TIMED_OUT)
        for mutant in self._alive:
            self._record(mutant, Outcome.SURVIVED if mutant.inside else self._confirm(mutant))
        self.ended = True
        return True

    def _start(self, session: pytest.Session, number: int | None) -> None:
        """Run the tests in a fork, with a mutant's code or without."""
        self._collect(self._workers - 1)
        child = os.fork()
        if child:
            self._running[child] = number, time.perf_counter()
            return
        try:
            _silence()
            source = self._source if number is None else self._mutants[number].source
            try:
                _graft(importlib.import_module(_name(self._module)), source)
            except Exception:  # noqa: BLE001 - a module that cannot be imported
                os._exit(Outcome.KILLED)
            try:
                run_tests(session)
            finally:
                # Threads that hang must not keep the process.
                os._exit(Outcome.KILLED if session.testsfailed else Outcome.SURVIVED)
        finally:
            os._exit(Outcome.KILLED)

    def _collect(self, most: int) -> None:
        """Wait until at most that many forks run."""
        while len(self._running) > most:
            time.sleep(0.005)
            for child, (number, begin_s) in list(self._running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                outcome = Outcome.SURVIVED if done and status == 0 else Outcome.KILLED
                took_s = time.perf_counter() - begin_s
                if not done:
                    if took_s < (_CONTROL_TIMEOUT_S if number is None else self._timeout_s):
                        continue
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    outcome = Outcome.TIMED_OUT
                del self._running[child]
                if number is not None:
                    self._tried += 1
                    if outcome is Outcome.SURVIVED:
                        self._alive.append(self._mutants[number])
                    elif outcome is Outcome.TIMED_OUT:
                        self._late.append(number)
                    else:
                        self._record(self._mutants[number], outcome)
                    if self._tried % _TOLD_EVERY == 0:
                        print(f"  {self._tried} of {len(self._mutants)} tried, {len(self._alive)} alive", flush=True)
                elif outcome is not Outcome.SURVIVED:
                    pytest.exit("The tests fail without a mutant.", returncode=1)
                else:
                    # The last one tells how fast the machine is now.
                    self._timeout_s = max(_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR * took_s)

    def _record(self, mutant: Mutant, outcome: Outcome) -> None:
        now_s = time.perf_counter()
        self._records.add(mutant, outcome, now_s - self._told_s)
        self._told_s = now_s

    def _confirm(self, mutant: Mutant) -> Outcome:
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write(mutant.source)
            file.flush()
            command = [sys.executable, "-m", "tests.proof.mutants", self._module, "--with", file.name]
            try:
                done = subprocess.run(command, cwd=_ROOT, capture_output=True, timeout=600, check=False)
            except subprocess.TimeoutExpired:
                return Outcome.TIMED_OUT
        return Outcome.KILLED if done.returncode else Outcome.SURVIVED


def _graft(module: ModuleType, source: str) -> None:
    """Put the code of this source into a module whose functions and classes others have imported."""
    fresh: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(source, str(module.__file__), "exec", dont_inherit=True), fresh)
    for name, new in fresh.items():
        old = vars(module).get(name)
        if name.startswith("__") or new is old:
            continue
        if isinstance(old, type) and isinstance(new, type):
            for member, value in list(vars(new).items()):
                if isinstance(value, FunctionType | property | classmethod | staticmethod):
                    _graft_function(old, member, value)
        else:
            _graft_function(module, name, new)


def _graft_function(owner: Any, name: str, new: Any) -> None:
    old = vars(owner).get(name)
    function, fresh = _function(old), _function(new)
    if type(old) is type(new) and function is not None and fresh is not None:
        function.__code__, function.__defaults__ = fresh.__code__, fresh.__defaults__
        function.__kwdefaults__ = fresh.__kwdefaults__
    else:
        setattr(owner, name, new)


def _function(member: Any) -> FunctionType | None:
    inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
    return inner if isinstance(inner, FunctionType) else None


class _Mutated(importlib.machinery.SourceFileLoader):
    """Finds one module, with another source than its file has."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


def _run_with(module: str, source: str) -> int:
    """Run a module's tests with this source in its place: whatever imports it, imports this. Returns pytest's code."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pipeload"]:
        del sys.modules[name]
    for name in ("tests.engine.harness", "tests.engine"):
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _Mutated(_name(module), _ENGINE / module, source))
    return int(_run_pytest(module, []))


def _run_pytest(module: str, plugins: Sequence[object]) -> int | pytest.ExitCode:
    importlib.import_module("tests.engine.harness").PATIENCE_S = _PATIENCE_S
    # An example that fails is enough, it need not be made small.
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutants")
    # Its modules import torch, which no test of these modules needs.
    sys.modules["pipeload_export"] = None  # type: ignore[assignment]
    # Once, and not in every fork.
    for found in pkgutil.walk_packages(importlib.import_module("pipeload").__path__, "pipeload."):
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(found.name)
    tests = [str(found) for pattern in TESTS[module] for found in sorted((_ROOT / "tests" / "engine").glob(pattern))]
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-W", imported, "-m", "not slow and not survey"]
    return pytest.main([*options, *tests], plugins)


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


def _fault(module: str) -> str:
    return f"one fault in `{module}`"


def _name(module: str) -> str:
    return ".".join(["pipeload", *Path(module).with_suffix("").parts])


def _explained(module: str) -> set[tuple[str, str]]:
    """The survivors that mutants.md explains, as lines before and after: "- `before` -> `after`: reason"."""
    if not _EXPLAINED.exists():
        return set()
    _, _, section = _EXPLAINED.read_text().partition(f"\n## {module}\n")
    return set(re.findall(r"^- `(.*)` -> `(.*?)`: ", section.partition("\n## ")[0], re.MULTILINE))


if __name__ == "__main__":
    main()
