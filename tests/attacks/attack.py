"""An attack: what it tries, and how it ended. The modules beside this one have them.

An attack is a function that gets an empty folder, and tells how the product answered: `refused: ...` with the
product's own message, or `held`. It raises `SucceededError` where the attacker got what he wanted. The first line of
its docstring says what it tries; the module's says who the attacker is, and what he wants.
"""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeload.errors import PipeloadError

__all__ = [
    "HELD",
    "Attack",
    "SucceededError",
    "all_attacks",
    "attack",
    "attacks_of",
    "in_child",
    "names",
    "refused",
    "run_module",
]

HELD = "held"
_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
_OTHERS = {"__main__", "attack", "victims"}
_SHOWN = 160

Run = Callable[[Path], str]


class SucceededError(AssertionError):
    """The attacker got what he wanted."""


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        module: its module's name in this folder.
        name: of the function.
        tries: the first line of its docstring.
        run: gets a folder; gives the outcome.
    """

    module: str
    name: str
    tries: str
    run: Run


def attack(run: Run) -> Run:
    """Marks a function as an attack."""
    run.is_attack = True
    return run


def names() -> list[str]:
    """The modules with attacks."""
    found = (path.stem for path in sorted(_FOLDER.glob("*.py")))
    return [name for name in found if name not in _OTHERS and not name.startswith("test_")]


def attacks_of(module: str) -> list[Attack]:
    """The attacks of a module, in its order."""
    found = vars(importlib.import_module(f"tests.attacks.{module}")).items()
    return [
        Attack(module, name, str(one.__doc__).partition("\n")[0], one)
        for name, one in found
        if getattr(one, "is_attack", False)
    ]


def all_attacks() -> list[Attack]:
    """The attacks of all modules."""
    return [one for name in names() for one in attacks_of(name)]


def refused(
    act: Callable[[], Any], kind: type[BaseException] | tuple[type[BaseException], ...] = PipeloadError, says: str = ""
) -> str:
    """The outcome of an attack that must be refused.

    Args:
        act: makes the attempt.
        kind: of the refusal.
        says: words of its message: another refusal means that the attack never met the guard that it is about.
    """
    try:
        got = act()
    except kind as error:
        text = " ".join(str(error).split())
        if says not in text:
            raise SucceededError(f"refused for another reason than '{says}': {text}") from error
        return f"refused: {text}"
    raise SucceededError(f"nothing was refused; it got {got!r:.200}")


def in_child(code: str, *arguments: object, cpu_s: int = 30, memory_bytes: int = 2 << 30) -> str:
    """What a program of Python prints at its end, held to a time of the processor and to a size of memory.

    Raises:
        SucceededError: it took more of either, or ended by a signal.
    """

    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    path = os.pathsep.join(map(str, (_ROOT / "engine", _ROOT / "exporter", _ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        preexec_fn=hold,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise SucceededError(f"the program ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout.strip()


def run_module(name: str) -> None:
    """Run the attacks of a module, and print how each ended."""
    for one in attacks_of(name):
        print(f"{one.name}: {one.tries}")
        with tempfile.TemporaryDirectory() as folder:
            begin_s = time.perf_counter()
            outcome = one.run(Path(folder))
        print(f"    {outcome[:_SHOWN]}    ({time.perf_counter() - begin_s:.1f} s)")
