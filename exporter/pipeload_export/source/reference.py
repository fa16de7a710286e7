"""The program of the second child process: the source's own answers to seeded inputs. See `asking`."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload_export.source.asking import Questions, visible
from pipeload_export.source.filling import answering
from pipeload_export.source.refused import Declined, reason
from pipeload_export.source.tracer import load_hollow, load_model, serve

__all__ = ["MAX_ERROR_CHARACTERS", "answer", "nudge", "run_child", "untouched"]

_NUDGE = 1e-7
"""Relative change of the embeddings: about the rounding of float32, which no two implementations share."""
MAX_ERROR_CHARACTERS = 300


def run_child(request_path: str, folder: str, parent: str) -> None:
    """Answer the questions in the folder, and leave the outcome beside it."""
    serve(Questions, answer, request_path, folder, parent)


def answer(questions: Questions, folder: Path) -> None:
    """Write the source's answers into the folder that holds the questions.

    Each question meets the model as it was loaded: some keep what earlier inputs were like.
    """
    warnings.simplefilter("ignore")
    if not questions.model.hollow:
        _answer(load_model(questions.model, folder).eval(), questions, folder)
        return
    with answering(load_hollow(questions.model, folder)) as model:
        _answer(model, questions, folder)


def _answer(model: Any, questions: Questions, folder: Path) -> None:
    import torch
    import transformers

    outputs: dict[int, list[str]] = {}
    effects: dict[str, Mapping[str, float]] = {}
    errors: dict[str, str] = {}
    for number in range(questions.cases):
        prefix = f"case.{number}."
        files = {path.name: path for path in folder.glob(f"{prefix}*.npy")}
        inputs = {name.removeprefix(prefix).removesuffix(".npy"): np.load(path) for name, path in files.items()}
        try:
            found = _outputs(model, inputs, questions.outputs)
            effects[f"case.{number}"] = _effects(found, _outputs(model, inputs, questions.outputs, nudged=True))
        except Declined:
            raise
        except Exception as error:  # noqa: BLE001 - the source takes no inputs of this size
            errors[f"case.{number}"] = reason(error, MAX_ERROR_CHARACTERS)
            continue
        outputs[number] = list(found)
        for name, array in found.items():
            np.save(folder / f"answer.case.{number}.{name}.npy", array)
    for number in range(questions.prompts):
        ids = np.load(folder / f"prompt.{number}.npy")
        try:
            tokens, logits = _continued(model, ids, questions.new_tokens)
            text = {"input_ids": np.concatenate([ids, tokens[:, :-1]], axis=1)}
            found, moved = (_outputs(model, text, ["logits"], nudged=nudged) for nudged in (False, True))
        except Declined:
            raise
        except Exception as error:  # noqa: BLE001 - nor this text
            errors[f"prompt.{number}"] = reason(error, MAX_ERROR_CHARACTERS)
            continue
        effects[f"prompt.{number}"] = _effects(found, moved)
        np.save(folder / f"answer.prompt.{number}.tokens.npy", tokens)
        np.save(folder / f"answer.prompt.{number}.logits.npy", logits)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    answers = {"outputs": outputs, "effects": effects, "errors": errors, "versions": versions}
    (folder / "answers.json").write_text(json.dumps(answers))


def _outputs(
    model: Any, inputs: Mapping[str, NDArray[Any]], wanted: list[str], *, nudged: bool = False
) -> dict[str, NDArray[Any]]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        tensors["use_cache"] = False
    with untouched(model), torch.no_grad(), nudge(model) if nudged else nullcontext():
        found = model(**tensors, return_dict=True)
    mask = inputs.get("attention_mask")
    return {name: visible(found[name].float().numpy(), mask) for name in wanted if torch.is_tensor(found.get(name))}


def _continued(model: Any, ids: NDArray[Any], new_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The greedy tokens that transformers' own `generate` adds, and the logits it chose them by."""
    import torch
    from transformers import GenerationConfig

    # In the place of the model's own, whose settings would fill up what is left out.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    tensor = torch.from_numpy(ids)
    with untouched(model), torch.no_grad():
        made = model.generate(tensor, attention_mask=torch.ones_like(tensor))
    logits = torch.stack(made.logits, dim=1).float().numpy()
    return made.sequences[:, ids.shape[1] :].numpy(), logits


def _effects(found: Mapping[str, NDArray[Any]], moved: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """How far each output moves."""
    result = {}
    for name, array in found.items():
        difference = np.abs(moved[name].astype(np.float64) - array)
        result[name] = float(difference[np.isfinite(difference)].max(initial=0.0))
    return result


@contextmanager
def nudge(model: Any) -> Iterator[None]:
    """A context in which the embeddings differ by the rounding of float32."""
    import torch

    random = torch.Generator().manual_seed(0)

    def change(_module: Any, _given: Any, made: Any) -> Any:
        if not torch.is_tensor(made) or not made.is_floating_point():
            return made
        return made * (1 + _NUDGE * (2 * torch.randint(0, 2, made.shape, generator=random) - 1))

    embeddings = None
    with suppress(NotImplementedError, AttributeError):
        embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, torch.nn.Module):
        # None, or a parameter: Perceiver's latents.
        yield
        return
    hook = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """A context that undoes what a pass leaves in the modules: a dynamic rope's frequencies, BigBird's attention."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    attributes = [vars(owner) for owner in (*modules, *configs.values())]
    # Buffers and submodules lie in dictionaries of their own.
    kept = [(one, dict(one)) for each in attributes for one in (each, *each.values()) if isinstance(one, dict)]
    try:
        yield
    finally:
        for now, before in kept:
            now.clear()
            now.update(before)
