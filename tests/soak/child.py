"""The process that has a budget: `python -m tests.soak.child < ORDER`, with a JSON line on stdout for each step.

Everything that it needs is imported before the models are loaded, so that it is counted, as a program's own data are.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.random
from tests.soak.calls import answer
from tests.soak.draw import Model, Step

import pipeload
import pipeload.model

__all__ = ["Order", "Told"]


class Order(msgspec.Struct, frozen=True):
    """What the process is to do.

    Attributes:
        directories: of the models.
        known: what is known of each.
        budget_bytes: at first.
        loaders, threads: see `pipeload.load`.
        steps: its calls.
        budgets: bytes for each step; those of `set_budget` count.
        answers: the folder for its answers, `STEP-CALL.npz`.
    """

    directories: tuple[str, ...]
    known: tuple[Model, ...]
    budget_bytes: int
    loaders: int | None
    threads: int | None
    steps: tuple[Step, ...]
    budgets: tuple[int, ...]
    answers: str


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of one step; -1 is loading, and the last one is the end.

    Attributes:
        step: its number.
        error: the class of the first error, and its message.
        needed_bytes: that a BudgetError named.
        rss_bytes: when the step had ended.
        peak_bytes: of the process so far, as the kernel says.
    """

    step: int
    error: tuple[str, str] | None = None
    needed_bytes: int = 0
    rss_bytes: int = 0
    peak_bytes: int = 0


def main() -> None:
    """Do what stdin orders."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    models: list[pipeload.Model] = []

    def load() -> None:
        shared = len(order.directories) > 1
        budget = pipeload.Budget(order.budget_bytes) if shared else order.budget_bytes
        for directory in order.directories:
            models.append(pipeload.load(directory, budget, loaders=order.loaders, threads=order.threads))

    def call(step: Step, name: str) -> None:
        arrays = answer(models[step.model], order.known[step.model], step)
        np.savez(Path(order.answers, f"{name}.npz"), **arrays)

    def do(number: int, step: Step) -> None:
        if step.do == "set_budget":
            calls: list[Callable[[], object]] = [partial(models[0].set_budget, order.budgets[number])]
        else:
            calls = [partial(call, one, f"{number}-{i}") for i, one in enumerate(step.calls or (step,))]
        tell(number, calls)

    try:
        if tell(-1, [load]):
            for number, step in enumerate(order.steps):
                do(number, step)
    finally:
        for model in models:
            model.close()
    tell(len(order.steps), [])


def tell(step: int, calls: list[Callable[[], object]]) -> bool:
    """Make the calls, several at the same time, and say what came of them. Returns whether all were answered."""
    errors: list[pipeload.PipeloadError] = []

    def one(call: Callable[[], object]) -> None:
        try:
            call()
        except pipeload.PipeloadError as error:
            errors.append(error)

    if len(calls) == 1:
        one(calls[0])
    else:
        threads = [threading.Thread(target=one, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    errors.sort(key=lambda error: getattr(error, "needed_bytes", 1 << 62), reverse=True)
    status = Path("/proc/self/status").read_text()
    rss, peak = (int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    told = Told(
        step,
        error=(type(errors[0]).__name__, str(errors[0])) if errors else None,
        needed_bytes=getattr(errors[0], "needed_bytes", 0) if errors else 0,
        rss_bytes=rss,
        peak_bytes=peak,
    )
    print(msgspec.json.encode(told).decode(), flush=True)
    return not errors


if __name__ == "__main__":
    main()
