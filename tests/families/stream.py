"""Runs an exported model under the smallest budget that works, in a process without torch.

    python -m tests.families.stream FOLDER

FOLDER holds the directory `model`, the inputs `cases.npz`, and the prompts in `prompts.json`. The answers go to
`streamed.npz`, and all else to `streamed.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import pipeload

_NEW_TOKENS = 32
_MOST_BYTES = 4_000_000_000
"""A tiny model that is planned with more cannot run on any machine that its real sizes are meant for."""
_Answer = TypeVar("_Answer")


def main(folder: Path) -> int:
    """Run all cases and prompts."""
    facts: dict[str, Any] = {"refused": {}, "greedy": [], "batch": None}
    arrays: dict[str, Any] = {}
    with np.load(folder / "cases.npz") as saved:
        cases = {name: saved[name] for name in saved.files}
    numbers = sorted({int(name.split(".")[0]) for name in cases})
    with _open(folder / "model") as model:
        facts["streamed_bytes"] = model.plan.streamed_bytes
        wanted = {spec.name for spec in model.outputs}
        taken = {spec.name: spec.dtype for spec in model.inputs}
        for number in numbers:
            prefix = f"{number}."
            given = {name.removeprefix(prefix): array for name, array in cases.items() if name.startswith(prefix)}
            # Some graphs take a mask as numbers of another type than transformers does.
            inputs = {name: array.astype(taken.get(name, array.dtype)) for name, array in given.items()}
            try:
                outputs = _within_budget(model, lambda inputs=inputs: model.run(inputs))
            except pipeload.PipeloadError as error:
                facts["refused"][str(number)] = f"{type(error).__name__}: {error}"
                continue
            arrays |= {f"{number}.{name}": array for name, array in outputs.items() if name in wanted}
        prompts = json.loads((folder / "prompts.json").read_text())
        for prompt in prompts:
            facts["greedy"].append(_continued(model, [prompt]))
        if len(prompts) > 1:
            facts["batch"] = _continued(model, prompts)
    np.savez(folder / "streamed.npz", **arrays)
    (folder / "streamed.json").write_text(json.dumps(facts))
    return 0


def _open(directory: Path) -> pipeload.Model:
    try:
        return pipeload.load(directory, 1)
    except pipeload.BudgetError as error:
        return pipeload.load(directory, error.needed_bytes)


def _within_budget(model: pipeload.Model, call: Callable[[], _Answer]) -> _Answer:
    """The answer; a budget that is too small for it grows to the smallest that works."""
    while True:
        try:
            return call()
        except pipeload.BudgetError as error:
            if error.needed_bytes > _MOST_BYTES or error.needed_bytes <= error.budget_bytes:
                raise
            model.set_budget(error.needed_bytes)


def _continued(model: pipeload.Model, prompts: list[list[int]]) -> list[list[int]] | str:
    try:
        made = _within_budget(
            model, lambda: model.generate(prompts, max_new_tokens=_NEW_TOKENS, eos_token_id=[], do_sample=False)
        )
    except pipeload.PipeloadError as error:
        return f"{type(error).__name__}: {error}"
    return [list(one.token_ids) for one in made]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
