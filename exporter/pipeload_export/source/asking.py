"""Seeded inputs -> the answers of the source itself: transformers' eager model in float32, in a child process.

The child, `reference`, reads a request from a file and inputs from others, and answers with a file for each array.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.machine.memory import auto_budget_bytes
from pipeload.machine.sizes import format_bytes
from pipeload.notify import Notify
from pipeload_export.source.refused import Declined
from pipeload_export.source.tracing import Request, run_child

__all__ = ["Answers", "Questions", "ask", "answering_bytes", "visible"]

_CHILD = "import sys; from pipeload_export.source.reference import run_child; run_child(*sys.argv[1:])"
_WEIGHTS_FACTOR, _MAPPED_FACTOR, _LIBRARIES_BYTES = 1.2, 0.1, 900 << 20
"""Memory of the child per byte of float32 weights, likewise where they are mapped, and beside them: the libraries, and
the activations of a case."""
_RESIDENT_SHARE = 1 / 2
"""Float32 files up to this part of the free memory stay in it between passes, where disk has room for them. Reading the
checkpoint for each operation is slower than that, and faster than reading twice the bytes from float32 files."""
_MOST_COLUMNS = 8192
"""Of a vocabulary this many logits are kept for each position, evenly spread, so that memory and disk stay bounded."""
_STEP = "ask the source"


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """The parent's request to the child.

    Attributes:
        model: the source.
        cases: number of sets of inputs; they lie in the folder as `case.0.input_ids.npy` and so on.
        prompts: number of prompts to continue, `prompt.0.npy` and so on, `[batch, length]`.
        new_tokens: tokens to add to each prompt.
        outputs: the outputs that are wanted, where the source has them.
    """

    model: Request
    cases: int
    prompts: int
    new_tokens: int
    outputs: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the source says; the arrays stay in their files until they are asked for.

    Attributes:
        folder: where they lie.
        outputs: number of each case that the source answered -> its outputs.
        effects: name of a case or prompt -> output -> how far it moves when the source's embeddings change by 1e-7 of
            their size.
        errors: name of a case or prompt -> why the source itself gives no answer.
        versions: the libraries that computed them.
    """

    folder: Path
    outputs: Mapping[int, Sequence[str]]
    effects: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, str]
    versions: Mapping[str, str]

    def output(self, case: int, name: str) -> NDArray[Any]:
        """An output, as `visible` leaves it."""
        return self._array(f"case.{case}.{name}")

    def silence(self, prompt: int) -> str | None:
        """Why the source does not continue a prompt; None where it does."""
        return self.errors.get(f"prompt.{prompt}")

    def tokens(self, prompt: int) -> NDArray[Any]:
        """The greedy tokens after a prompt, `[batch, new_tokens]`."""
        return self._array(f"prompt.{prompt}.tokens")

    def logits(self, prompt: int) -> NDArray[Any]:
        """The logits that each of the tokens was chosen by, `[batch, new_tokens, vocabulary]`."""
        return self._array(f"prompt.{prompt}.logits")

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"answer.{name}.npy", mmap_mode="r")
        return array


def visible(array: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """The part of an output that is compared: nothing where the input is padding, and of a vocabulary a part.

    Args:
        array: the output.
        mask: the attention mask, `[batch, length]`; None where there is none.
    """
    if array.ndim == 3:
        array = array[..., :: -(-array.shape[-1] // _MOST_COLUMNS)]
    return array[mask.astype(bool)] if mask is not None and array.shape[:2] == mask.shape else array


def ask(
    request: Request,
    folder: Path,
    cases: Sequence[Mapping[str, NDArray[Any]]],
    prompts: Sequence[NDArray[Any]],
    new_tokens: int,
    outputs: Sequence[str],
    progress: Notify,
) -> Answers:
    """Let the source answer, in a child process that is gone when this returns.

    Args:
        request: the source.
        folder: a new folder for questions and answers.
        cases: sets of inputs of its forward pass.
        prompts: token ids `[batch, length]` that it continues.
        new_tokens: tokens that it adds to each.
        outputs: names of outputs.
        progress: told that the source is at work.

    Raises:
        ExportError: there is not enough memory, or the source could not be loaded.
    """
    folder.mkdir(parents=True)
    for number, inputs in enumerate(cases):
        for name, array in inputs.items():
            np.save(folder / f"case.{number}.{name}.npy", array)
    for number, ids in enumerate(prompts):
        np.save(folder / f"prompt.{number}.npy", ids)
    model = msgspec.structs.replace(request, hollow=_reads_as_needed(request, folder))
    questions = Questions(
        model=model,
        cases=len(cases),
        prompts=len(prompts),
        new_tokens=new_tokens,
        outputs=list(outputs),
    )
    total = len(cases) + len(prompts)

    def tick() -> None:
        progress(_STEP, min(_answered(folder), total), total)

    try:
        put_questions(questions, folder, answering_bytes(model), tick)
    except Declined:
        # With float32 files on the disk, which take room and time, or with all weights in memory.
        model = msgspec.structs.replace(model, hollow=False)
        put_questions(msgspec.structs.replace(questions, model=model), folder, answering_bytes(model), tick)
    progress(_STEP, total, total)
    found = json.loads((folder / "answers.json").read_bytes())
    return Answers(folder=folder, outputs={int(n): names for n, names in found.pop("outputs").items()}, **found)


def _reads_as_needed(request: Request, folder: Path) -> bool:
    """Whether the source reads weights for each operation, instead of float32 files made of them or all at once."""
    if not request.may_be_hollow:
        return False
    if request.gguf:
        return request.weight_bytes > auto_budget_bytes() * _RESIDENT_SHARE
    if not request.widened_bytes:
        return False
    stays = request.widened_bytes <= auto_budget_bytes() * _RESIDENT_SHARE
    return not stays or request.widened_bytes > shutil.disk_usage(folder.parent).free // 2


def answering_bytes(request: Request) -> int:
    """An estimate of the child's peak memory. Raises ExportError if less is free."""
    factor = _MAPPED_FACTOR if request.mapped or request.hollow else _WEIGHTS_FACTOR
    needed, free = int(request.weight_bytes * factor) + _LIBRARIES_BYTES, auto_budget_bytes()
    if needed > free:
        raise ExportError(
            f"Comparing with {request.name} takes about {format_bytes(needed)} of memory, and {format_bytes(free)} are "
            "free. Do it on a larger machine, or leave the comparison out with --no-verify."
        )
    return needed


def put_questions(questions: Questions, folder: Path, needed: int, tick: Callable[[], None]) -> None:
    """Run the child. Raises ExportError if it refuses or dies, Declined if it needs the weights in memory."""
    name = questions.model.name
    error = run_child(
        _CHILD,
        questions,
        folder,
        fact=f"Comparing with {name}",
        needed=needed,
        online=questions.model.trust_remote_code,
        tick=tick,
    )
    if error:
        raise ExportError(f"{name} cannot be compared with what was exported: {error}")


def _answered(folder: Path) -> int:
    """Cases and prompts that the child has begun to answer."""
    names = {path.name for path in folder.glob("answer.*.npy")}
    return len({tuple(name.split(".")[1:3]) for name in names})
