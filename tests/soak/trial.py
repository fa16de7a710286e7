"""One run of the soak: a process under its budget, again under what it named, and its answers beside the unlimited."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tests.models import REPOSITORY
from tests.soak.child import Order, Told
from tests.soak.draw import Model, Run, Step
from tests.soak.models import Unlimited, weight_bytes

from pipeload.format import manifest as manifests
from pipeload.format.closeness import range_of

__all__ = ["Report", "Soak"]

_TIMEOUT_S = 600
_CLOSE = 1e-4
_CLOSE_ROUNDED = 2e-2
"""Parts of an output's range: another layout of weights rounds floats in another order; where 8 or 4 bits are computed
with, or caches rounded to 8, a rounding that falls on the other side is a step of theirs."""


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a run: a line of the results.

    Attributes:
        seed: of the run.
        models: that it used.
        budget_bytes: the first budget.
        peaks: (budget, peak) of each process that was started.
        answers: that were compared.
        refusals: BudgetErrors, each of which was followed by a process with what it named.
        tags: the kinds of row that it counts for.
        failures: the promises that it broke.
        seconds: that it took.
    """

    seed: int
    models: tuple[str, ...]
    budget_bytes: int
    peaks: tuple[tuple[int, int], ...] = ()
    answers: int = 0
    refusals: int = 0
    tags: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    seconds: float = 0.0


class Soak:
    """Runs, and what they are compared with.

    Args:
        models: name -> what is known of it, and its directory.
        cache: a folder for the findings that runs share.
    """

    def __init__(self, models: dict[str, tuple[Model, Path]], cache: Path) -> None:
        self._models = models
        self._cache = cache
        self._smallest: dict[tuple[str, ...], int] = {}
        self.unlimited = Unlimited()

    def run(self, run: Run) -> Report:
        """Do what a seed has drawn, and hold it against the promises."""
        smallest = self._smallest_of(run.models)
        weights = sum(weight_bytes(self._models[name][1]) for name in run.models)
        first = run.budget.bytes_of(smallest, weights)
        budgets = [step.budget.bytes_of(smallest, weights) for step in run.steps]
        failures: list[str] = []
        peaks: list[tuple[int, int]] = []
        answers = refusals = 0
        for _ in range(2 * len(run.steps) + 3):
            with tempfile.TemporaryDirectory(prefix="pipeload-soak-") as folder:
                order = self._order(run, first, budgets, folder)
                cache = Path(folder) / "cache" if run.fresh else self._cache
                told, fault = _start(order, cache)
                failures += [fault] if fault else []
                largest, force = _held(first, budgets, run.steps, told)
                peaks.append((largest, told[-1].peak_bytes if told else 0))
                failures += _broken(told, force, largest, refused=_refused(told, -1))
                compared, wrong = self._compare(run, told, Path(folder))
                answers, failures = answers + compared, failures + wrong
            refused = next((one for one in told if one.needed_bytes), None)
            if refused is None or failures:
                break
            # The process that is told what is needed, and gets it, is not refused there again.
            refusals += 1
            place = _budget_in_force(run.steps, told, refused.step)
            before = first if place < 0 else budgets[place]
            if refused.needed_bytes <= before:
                failures.append(f"step {refused.step} was refused {before} bytes, and needs {refused.needed_bytes}")
                break
            if place < 0:
                first = refused.needed_bytes
            else:
                budgets[place] = refused.needed_bytes
        else:
            failures.append("it is refused again and again, whatever it names")
        return Report(
            seed=run.seed,
            models=run.models,
            budget_bytes=run.budget.bytes_of(smallest, weights),
            peaks=tuple(peaks),
            answers=answers,
            refusals=refusals,
            tags=tuple(_tags(run, self._models)),
            failures=tuple(failures),
        )

    def _order(self, run: Run, first: int, budgets: list[int], folder: str) -> Order:
        found = [self._models[name] for name in run.models]
        return Order(
            directories=tuple(str(directory) for _, directory in found),
            known=tuple(known for known, _ in found),
            budget_bytes=max(first, 1),
            loaders=run.loaders,
            threads=run.threads,
            steps=run.steps,
            budgets=tuple(max(one, 1) for one in budgets),
            answers=folder,
        )

    def _smallest_of(self, names: tuple[str, ...]) -> int:
        """The smallest budget under which the models open, as the engine names it."""
        if names not in self._smallest:
            run = Run(0, names, budget=None, loaders=None, threads=None, fresh=False, steps=())  # type: ignore[arg-type]
            budget = 1
            while True:
                told, fault = _start(self._order(run, budget, [], ""), self._cache)
                if fault or not told:
                    raise RuntimeError(f"{names} cannot be opened: {fault}")
                if not told[0].needed_bytes:
                    break
                budget = told[0].needed_bytes
            self._smallest[names] = budget
        return self._smallest[names]

    def _compare(self, run: Run, told: list[Told], folder: Path) -> tuple[int, list[str]]:
        wrong: list[str] = []
        compared = 0
        for one in told:
            if one.error or not 0 <= one.step < len(run.steps):
                continue
            step = run.steps[one.step]
            for number, call in enumerate(step.calls or ([step] if step.do != "set_budget" else [])):
                with np.load(folder / f"{one.step}-{number}.npz") as found:
                    actual = {name: found[name] for name in found.files}
                compared += 1
                if fault := self._fault(run.models[call.model], call, actual):
                    wrong.append(f"step {one.step}, call {number} of {run.models[call.model]}: {fault}")
        return compared, wrong

    def _fault(self, name: str, step: Step, actual: dict[str, NDArray[np.generic]]) -> str | None:
        """How an answer differs from the unlimited one; None where it does not."""
        known, directory = self._models[name]
        expected = self.unlimited.answer(known, directory, step)
        if actual.keys() != expected.keys():
            return f"it has the outputs {sorted(actual)}"
        manifest = manifests.read(directory)
        rounded = any(shard.packed for shard in manifest.shards) or name.endswith("-int8-caches")
        share = _CLOSE_ROUNDED if rounded else _CLOSE
        for key, right in expected.items():
            got = actual[key]
            if got.shape != right.shape or got.dtype != right.dtype:
                return f"{key} is {got.dtype} {got.shape}, not {right.dtype} {right.shape}"
            if key == "tokens":
                if fault := self._token_fault(known, directory, step, got, right, share):
                    return fault
                continue
            error = float(np.abs(got.astype(np.float64) - right.astype(np.float64)).max(initial=0))
            if not error <= share * range_of(right, str(right.dtype)):
                return f"{key} is off by {error / range_of(right, str(right.dtype)):.1e} of its range"
        return None

    def _token_fault(
        self,
        known: Model,
        directory: Path,
        step: Step,
        got: NDArray[np.generic],
        right: NDArray[np.generic],
        share: float,
    ) -> str | None:
        from tests.soak.draw import tokens

        if np.array_equal(got, right):
            return None
        place = int(np.argmax(got != right))
        logits = self.unlimited.logits(known, directory, [*tokens(step, known), *map(int, right[:place])])
        gap = abs(float(logits[int(got[place])] - logits[int(right[place])])) / range_of(logits, "float32")
        # Two tokens that are as likely as each other, within the rounding.
        return (
            None if gap <= share else f"token {place} is {got[place]}, not {right[place]}: {gap:.1e} of the range apart"
        )


def _start(order: Order, cache: Path) -> tuple[list[Told], str | None]:
    environment = os.environ | {"PIPELOAD_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.soak.child"],
            input=msgspec.json.encode(order),
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"it hangs: no end after {_TIMEOUT_S} s"
    told = [msgspec.json.decode(line, type=Told) for line in done.stdout.splitlines()]
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return told, f"it ends with exit code {done.returncode}: {lines[-1] if lines else ''}"
    return told, None


def _refused(told: list[Told], step: int) -> bool:
    return any(one.step == step and one.needed_bytes for one in told)


def _held(first: int, budgets: list[int], steps: tuple[Step, ...], told: list[Told]) -> tuple[int, dict[int, int]]:
    """The largest budget that was in force, and the one in force after each step."""
    now = largest = first
    force: dict[int, int] = {}
    for one in told:
        if 0 <= one.step < len(steps) and steps[one.step].do == "set_budget" and not one.error:
            now = budgets[one.step]
            largest = max(largest, now)
        force[one.step] = now
    return largest, force


def _budget_in_force(steps: tuple[Step, ...], told: list[Told], refused: int) -> int:
    """The step that has set the budget which was too small: -1 for the first one."""
    if 0 <= refused < len(steps) and steps[refused].do == "set_budget":
        return refused
    place = -1
    for one in told:
        if 0 <= one.step < refused and steps[one.step].do == "set_budget" and not one.error:
            place = one.step
    return place


def _broken(told: list[Told], force: dict[int, int], largest: int, *, refused: bool) -> Iterator[str]:
    """The promises that what a process told has broken."""
    for one in told:
        if one.error and one.error[0] != "BudgetError":
            yield f"step {one.step}: {one.error[0]}: {one.error[1]}"
        if one.error and one.error[0] == "BudgetError" and not one.needed_bytes:
            yield f"step {one.step} names nothing that is needed: {one.error[1]}"
        # A budget that is refused is kept by no process: what it names was never read.
        if not refused and one.rss_bytes > force[one.step]:
            yield f"after step {one.step} it has {one.rss_bytes} bytes, over {force[one.step]}"
    if not refused and told and told[-1].peak_bytes > largest:
        yield f"its peak is {told[-1].peak_bytes} bytes, over {largest}"


def _tags(run: Run, models: dict[str, tuple[Model, Path]]) -> Iterator[str]:
    """The rows of the table that a run counts for."""
    if len(run.models) > 1:
        yield "two models under one Budget"
    elif run.models[0] not in ("minilm", "smollm2-135m") and models[run.models[0]][0].name.endswith(("int4", "int8")):
        yield "a real model of 8 or 4 bits"
    elif run.models[0] in ("minilm", "smollm2-135m"):
        yield "a real model of floats"
    else:
        yield "a tiny model"
    kinds = {step.do for step in run.steps} | {one.do for step in run.steps for one in step.calls}
    if "set_budget" in kinds:
        yield "set_budget in between"
    if "callers" in kinds:
        yield "several callers"
    if "generate" in kinds:
        yield "generation"
