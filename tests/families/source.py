"""What transformers answers: its model with eager attention, in float32, loaded from the checkpoint folder."""

from __future__ import annotations

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from tests.families.catalog import Family
from tests.families.inputs import Arrays, Case, cases, make_inputs, prompts

from pipeload_export.source.task import TASKS

NEW_TOKENS = 32


def load_source(family: Family, checkpoint: Path) -> Any:
    """The model, in a mode in which it draws no random numbers.

    Callers give each text a copy: some models remember what they were given. BigBird leaves its sparse attention for
    good once a text is short, and dynamic positions stay where the longest text has put them.
    """
    import torch
    import transformers

    kind = getattr(transformers, TASKS[family.task])
    try:
        model = kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=family.attention)
    except (ValueError, TypeError):  # a class without implementations of attention
        model = kind.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def answers(
    family: Family, checkpoint: Path, names: list[str], outputs: list[str]
) -> tuple[list[tuple[Case, Arrays, Arrays]], dict[str, str]]:
    """The model's answers to all cases.

    Args:
        names: the inputs of the exported graph.
        outputs: its outputs, without caches.

    Returns:
        Case, inputs and outputs; and the cases that transformers itself does not take, with what it says.
    """
    model = load_source(family, checkpoint)
    found, refused = [], {}
    for case in cases(family, model.config):
        inputs = make_inputs(names, case, family, model.config)
        try:
            given, again = (_answer(deepcopy(model), family.task, inputs, outputs) for _ in range(2))
        except (IndexError, RuntimeError, ValueError) as error:
            refused[case.name] = f"{type(error).__name__}: {error}"
            continue
        if any(not np.array_equal(given[name], again[name], equal_nan=True) for name in outputs):
            raise RuntimeError("transformers itself draws random numbers: two calls with the same inputs differ")
        found.append((case, inputs, given))
    return found, refused


def _answer(model: Any, task: str, inputs: Arrays, outputs: list[str]) -> Arrays:
    import torch

    known = inspect.signature(model.forward).parameters
    given = {name: torch.from_numpy(array) for name, array in inputs.items() if name in known}
    mask = inputs.get("attention_mask")
    if "position_ids" in known and mask is not None and task == "text-generation":
        # As its own `generate` does, whether the graph takes positions or not.
        given["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    if "use_cache" in known:
        given["use_cache"] = False
    with torch.no_grad():
        answer = model(**given, return_dict=True)
    found = {name: value for name, value in answer.items() if isinstance(value, torch.Tensor)}
    for value in answer.values():
        # MGP-STR has three outputs under one name.
        if isinstance(value, tuple) and not found and len(value) == len(outputs):
            found = dict(zip(outputs, value, strict=True))
    if missing := [name for name in outputs if name not in found]:
        # The exporter calls one output otherwise.
        rest = [name for name in found if name not in outputs]
        assert len(missing) == 1, f"transformers has {list(found)}, the graph {outputs}"
        found[missing[0]] = found[rest[0]]
    return {name: found[name].numpy() for name in outputs}


def greedy(family: Family, checkpoint: Path) -> list[tuple[list[int], list[int], list[float]]]:
    """For each prompt: its ids, the new ones, and how far the two best logits of each are apart, over their range."""
    import torch

    model = load_source(family, checkpoint)
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    found = []
    for prompt in prompts(model.config, NEW_TOKENS):
        ids = torch.tensor([prompt])
        try:
            made = deepcopy(model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        except (IndexError, RuntimeError, ValueError):  # a text longer than the model's positions
            continue
        logits = torch.cat(made.logits).float()
        best = logits.topk(2).values
        gaps = (best[:, 0] - best[:, 1]) / (logits.max(1).values - logits.min(1).values)
        found.append((prompt, made.sequences[0, len(prompt) :].tolist(), gaps.tolist()))
    return found
