"""The calls of a run, as the process under a budget makes them, and as the unlimited one does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.soak.draw import Model, Step, texts, tokens

import pipeload

__all__ = ["answer", "inputs"]

Arrays = dict[str, NDArray[Any]]


def inputs(model: pipeload.Model, known: Model, rows: int, length: int, seed: int) -> Arrays:
    """Seeded arrays for one pass of the model."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for spec in model.inputs:
        if spec.name == "pixel_values":
            shape = [rows, *(size if isinstance(size, int) else 32 for size in spec.shape[1:])]
            found[spec.name] = random.standard_normal(shape, dtype=np.float32)
        elif spec.name in ("input_ids", "token_type_ids"):
            most = known.vocabulary if spec.name == "input_ids" else 1
            found[spec.name] = random.integers(0, most, (rows, length)).astype(spec.dtype)
        elif spec.name == "position_ids":
            found[spec.name] = np.tile(np.arange(length, dtype=spec.dtype), (rows, 1))
        elif spec.name == "attention_mask":
            found[spec.name] = np.ones((rows, length), spec.dtype)
        else:
            raise ValueError(f"no recipe for the input {spec.name} of {known.name}")
    return found


def answer(model: pipeload.Model, known: Model, step: Step) -> Arrays:
    """What the model answers, as arrays."""
    if step.do == "embed":
        return {"vectors": model.embed(texts(step))}
    if step.do == "generate":
        new = step.sizes[0][1]
        made = model.generate(tokens(step, known), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return {"tokens": np.array(made.token_ids, np.int64)}
    items = [inputs(model, known, rows, length, step.seed + i) for i, (rows, length) in enumerate(step.sizes)]
    if step.do == "run":
        return model.run(items[0])
    return {
        f"{i}.{name}": array
        for i, out in enumerate(model.run_many(items, step.together))
        for name, array in out.items()
    }
