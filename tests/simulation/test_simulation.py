"""A seed is one run, planted faults are found, and no module of the pipeline escapes the seam."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.simulation import exhaustive
from tests.simulation.planted import PLANTED
from tests.simulation.primitives import Threading
from tests.simulation.run import run
from tests.simulation.scenario import Ask, Scenario, draw
from tests.simulation.seam import REPLACED, installed

import pipeload.pipeline
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.reservations import Reservations

FOUND = {
    119: "a header that came in two reads was called damaged",
    450: "a start of the Loading Agents after a close was an AssertionError",
    494: "an error at the closing of a buffer hid that of the disk",
    4442: "a session that had failed kept its memory while another shard had its reservation",
    1114: "the next shard was packed while the original of the one before had its memory",
    7290643: "an error of the recovery after a failed batch had an exception of the pipeline's own in its chain",
    724: "a pass was refused that the plan in force has room for",
}
"""Seeds that have found a fault of the engine, which was mended since -> the fault."""

_WAITS = {"threading", "time", "concurrent", "queue", "asyncio", "multiprocessing", "_thread", "sched", "select"}
"""Modules by which a thread may wait, be started, or see the time."""


@pytest.fixture(autouse=True)
def seam() -> Iterator[None]:
    gc.disable()
    try:
        with installed():
            yield
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(25))
def test_runs_keep_every_promise(seed: int) -> None:
    outcome = run(draw(seed), seed)
    assert outcome.failure is None, f"python -m tests.simulation --seed {seed}\n{outcome.failure}"


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_have_found_faults_find_none(seed: int) -> None:
    assert run(draw(seed), seed).failure is None, FOUND[seed]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name: str) -> None:
    assert PLANTED[name].finds(PLANTED[name].found_by)


@pytest.mark.parametrize("name", [name for name, system in exhaustive.SYSTEMS.items() if not system.acts])
def test_the_smallest_systems_without_delays_keep_every_promise(name: str) -> None:
    failures = []
    count = exhaustive.schedules(exhaustive.SYSTEMS[name], 0, lambda *found: failures.append(found[-1].failure))
    assert (count, failures) == (1, [None])


def test_a_seed_is_one_run_in_every_process() -> None:
    program = (
        "import zlib\n"
        "from tests.simulation.run import run\n"
        "from tests.simulation.scenario import draw\n"
        "from tests.simulation.seam import installed\n"
        "with installed():\n"
        "    print([zlib.crc32(repr(run(draw(seed), seed, keep_steps=True).log).encode()) for seed in range(3)])\n"
    )
    expected = [zlib.crc32(repr(run(draw(seed), seed, keep_steps=True).log).encode()) for seed in range(3)]
    for number in ("1", "2"):
        # The order of sets must not matter.
        environment = os.environ | {"PYTHONHASHSEED": number, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        found = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == str(expected)


def test_an_agent_that_nothing_wakes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: Reservations, nbytes: int) -> None:
        with self._changed:
            self._reserved_bytes -= nbytes

    monkeypatch.setattr(Reservations, "release", release)
    outcome = run(Scenario(callers=((Ask(0.0, 1, 1),),)), 0)
    assert outcome.failure is not None
    assert "callers wait for ever" in outcome.failure
    assert "waits for a notification of reservations" in outcome.failure


def test_shards_out_of_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Exchange._advance
    monkeypatch.setattr(Exchange, "_advance", lambda self: (advance(self), advance(self)))
    assert run(Scenario(callers=((Ask(0.0, 1, 1),),)), 0).failure is not None


def test_no_module_of_the_pipeline_escapes_the_seam() -> None:
    # Whatever such a module imports by which threads wait or start, or that tells the time, has a stand-in.
    allowed = {"threading", "time", "concurrent.futures.Future", "concurrent.futures.CancelledError"}
    folder = Path(str(pipeload.pipeline.__file__)).parent
    for path in [*folder.glob("*.py"), folder.parent / "planning" / "replanner.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert all(alias.asname is None for alias in node.names if alias.name.split(".")[0] in _WAITS), path
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            waits = {name for name in names if name.split(".")[0] in _WAITS}
            assert waits <= allowed, f"{path.name} imports {waits - allowed}, for which seam.py has no stand-in"


def test_every_import_of_the_pipeline_is_replaced() -> None:
    folder = Path(str(pipeload.pipeline.__file__)).parent
    for path in folder.glob("*.py"):
        module = sys.modules[f"pipeload.pipeline.{path.stem}"] if path.stem != "__init__" else pipeload.pipeline
        for attribute, (real, _) in REPLACED.items():
            own = getattr(real, "__module__", "") == module.__name__ or path.stem == "session"
            assert own or vars(module).get(attribute) is not real, f"{path.name} has the real {attribute}"


def test_the_stand_in_has_all_names_that_the_pipeline_uses() -> None:
    folder = Path(str(pipeload.pipeline.__file__)).parent
    used = {
        node.attr
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "threading"
    }
    assert all(hasattr(Threading("test"), name) for name in used)
