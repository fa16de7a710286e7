"""What rounding the weights did to the answers: the finished directory, run by the engine, beside the source's graph.

Models of text get a passage of a book, *Alice's Adventures in Wonderland* (Lewis Carroll, 1865): decoders as one text,
others a paragraph at a time. All other models, and texts without a tokenizer, get seeded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, ExportError, PipeloadError
from pipeload.format.closeness import range_of
from pipeload.format.manifest import Accuracy, Manifest, OutputError, TensorSpec, write
from pipeload.notify import Notify
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.model_files import read_config
from pipeload.tasks.runner import FilesOnly
from pipeload.tasks.text.tokenizer import tokenizer_of
from pipeload_export.check.cases import Case, as_taken, sample_cases
from pipeload_export.check.running import given_room, opened

__all__ = [
    "accuracy_cases",
    "check_error",
    "compared_outputs",
    "keep_accuracy",
    "measure_accuracy",
    "output_error",
    "text_inputs",
    "with_no_past",
]

_TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
_MOST_TOKENS, _MOST_PARAGRAPH = 512, 128
_MOST_BYTES = 128 << 20
"""Of the logits of a text."""
_DECODES, _EMBEDS = "text-generation", "feature-extraction"
_PIECE = 1 << 20
"""Values that are compared in one step."""
_STEP = "measure what rounding the weights does"

Arrays = dict[str, NDArray[Any]]


def accuracy_cases(directory: Path, manifest: Manifest) -> list[Case]:
    """The inputs, without caches: the passage for a model of text with its tokenizer, seeded inputs for others."""
    return list(_texts(directory, manifest)) or _samples(directory, manifest)


def with_no_past(manifest: Manifest, cases: Sequence[Case], *, unsplit: bool) -> list[Case]:
    """The inputs with empty caches: as the shards take them, or as the unsplit graph does, none of them int8."""
    return [replace(case, inputs={**case.inputs, **_no_caches(manifest, case, unsplit=unsplit)}) for case in cases]


def compared_outputs(manifest: Manifest) -> list[str]:
    """Names of the outputs of floats that are no caches."""
    return [spec.name for spec in manifest.free_outputs if spec.dtype.startswith(("float", "bfloat"))]


def measure_accuracy(
    directory: Path, manifest: Manifest, cases: Sequence[Case], wanted: Sequence[Arrays], progress: Notify
) -> Accuracy:
    """Compare the answers of the directory, run by the engine, with those of the weights as they were.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        cases: from `accuracy_cases`.
        wanted: for each of them the source's `compared_outputs`.
        progress: called with the name of the step, the part done, and the whole.

    Raises:
        ExportError: it does not run, or makes numbers that are not finite where the source does.
    """
    names = compared_outputs(manifest)
    found = []
    try:
        with opened(directory) as model:
            for number, case in enumerate(cases):
                progress(_STEP, number, len(cases))
                found.append(given_room(model, partial(model.run, case.inputs)))
    except PipeloadError as error:
        raise ExportError(f"The engine cannot run what was exported: {error}") from error
    progress(_STEP, len(cases), len(cases))
    first = names[0] if names else ""
    pairs = [(one[first], other[first]) for one, other in zip(wanted, found, strict=True)] if first else []
    is_text = bool(cases) and "input_ids" in cases[0].inputs and first
    perplexities = (
        tuple(_perplexity(logits, cases[0].inputs["input_ids"]) for logits in pairs[0])
        if is_text and manifest.task == _DECODES
        else None
    )
    return Accuracy(
        inputs=tuple(case.name for case in cases),
        outputs=tuple(
            output_error(name, [one[name] for one in wanted], [one[name] for one in found]) for name in names
        ),
        cosine=min(_cosine(one, other) for one, other in pairs) if pairs and manifest.task == _EMBEDS else None,
        top1=_top1(pairs) if first == "logits" else None,
        perplexity=perplexities[1] if perplexities else None,
        source_perplexity=perplexities[0] if perplexities else None,
    )


def keep_accuracy(directory: Path, manifest: Manifest, accuracy: Accuracy, max_error: float | None) -> Manifest:
    """Hold the accuracy of small weights against a limit, if there is one, and write it into the manifest.

    Raises:
        ExportError: the worst error is above the limit.
    """
    if max_error is not None:
        check_error(accuracy, max_error)
    assert manifest.small_weights is not None
    manifest = replace(manifest, small_weights=replace(manifest.small_weights, accuracy=accuracy))
    write(manifest, directory)
    return manifest


def check_error(accuracy: Accuracy, limit: float) -> None:
    """Hold the worst error against a limit, in parts of an output's range.

    Raises:
        ExportError: it is above.
    """
    worst = max(accuracy.outputs, key=lambda one: one.max_rel_error, default=None)
    if worst and worst.max_rel_error > limit:
        raise ExportError(
            f"Rounding the weights changes output '{worst.output}' by up to {worst.max_rel_error:.3g} of its range, "
            f"and --max-error allows {limit:g}. Nothing was written. Export with more bits or smaller blocks "
            "(--weights int8, --block-size 16), or allow more."
        )


def text_inputs(manifest: Manifest, ids: NDArray[Any], past: int) -> Arrays:
    """The inputs of a text behind `past` tokens; `ids` is `[batch, length]`."""
    batch, new = ids.shape
    made = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + new), np.int64),
        "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
        "token_type_ids": np.zeros(ids.shape, np.int64),
    }
    return as_taken(manifest, made)


def _texts(directory: Path, manifest: Manifest) -> Iterator[Case]:
    """The passage as the model takes it; nothing for a model of something else, or without a tokenizer."""
    if not {spec.name for spec in manifest.free_inputs} <= _TEXT_INPUTS:
        return
    runner = FilesOnly(directory, manifest, ModelFiles(directory, manifest, verify=False))
    try:
        tokenizer = tokenizer_of(runner)
    except ConfigError:
        return
    passage = files("pipeload_export.check").joinpath("passage.txt").read_text(encoding="utf-8")
    decodes = manifest.task == _DECODES
    width = max((spec.shape[-1] for spec in manifest.free_outputs if spec.shape and _is_wide(spec)), default=1)
    most = min(_MOST_TOKENS if decodes else _MOST_PARAGRAPH, read_config(runner.files).max_positions or _MOST_TOKENS)
    most = max(min(most, _MOST_BYTES // (4 * int(width))), 2)
    for text in [passage] if decodes else passage.split("\n\n"):
        ids = np.array([tokenizer.encode(text.strip()).ids[:most]], np.int64)
        yield Case(name=f"1 x {ids.shape[1]} of the passage", inputs=text_inputs(manifest, ids, 0))


def _is_wide(spec: TensorSpec) -> bool:
    return isinstance(spec.shape[-1], int)


def _samples(directory: Path, manifest: Manifest) -> list[Case]:
    """Seeded inputs, with empty caches."""
    caches = manifest.cache_inputs
    cases = sample_cases(manifest, directory)
    return [
        replace(case, inputs={name: array for name, array in case.inputs.items() if name not in caches})
        for case in cases
        if not any(case.inputs[name].size for name in caches)
    ]


def _no_caches(manifest: Manifest, case: Case, *, unsplit: bool) -> Arrays:
    scales = {cache.scale for cache in manifest.caches if cache.scale} if unsplit else set()
    rounded = {cache.input for cache in manifest.caches if cache.scale} if unsplit else set()
    batch = len(next(iter(case.inputs.values())))
    made = {}
    for spec in manifest.inputs:
        if spec.name in manifest.cache_inputs - scales:
            shape = [size if isinstance(size, int) else 0 for size in spec.shape]
            dtype = "float32" if spec.name in rounded else spec.dtype
            made[spec.name] = np.zeros([batch, *shape[1:]], dtype)
    return made


def output_error(name: str, wanted: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> OutputError:
    """How far an output is from the source's, over all cases.

    Raises:
        ExportError: it has values that are no numbers where the source's are.
    """
    worst, total, count, ends = 0.0, 0.0, 0, [np.inf, -np.inf]
    for before, after in zip(wanted, found, strict=True):
        # Logits of a text are large, and float64 is twice as large.
        for begin in range(0, before.size, _PIECE):
            one, other = (array.reshape(-1)[begin : begin + _PIECE] for array in (before, after))
            known = np.isfinite(one)
            if not np.isfinite(other[known]).all():
                raise ExportError(
                    f"With rounded weights, output '{name}' has values that are no numbers. Nothing was written. "
                    "Export the model with --weights fp32."
                )
            values = one[known].astype(np.float64)
            error = np.abs(values - other[known])
            worst, total, count = (
                max(worst, float(error.max(initial=0.0))),
                total + float(error.sum()),
                count + error.size,
            )
            ends = [values.min(initial=ends[0]), values.max(initial=ends[1])]
    return OutputError(
        output=name,
        max_abs_error=worst,
        mean_abs_error=total / count if count else 0.0,
        max_rel_error=worst / range_of(np.array(ends), "float32"),
    )


def _cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Of the embeddings of a case, the mean over its tokens, the worst."""
    a, b = (array.astype(np.float64) for array in (one, other))
    a, b = (array.mean(axis=tuple(range(1, array.ndim - 1))) for array in (a, b))
    length = np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), np.finfo(np.float64).tiny)
    return float(((a * b).sum(axis=-1) / length).min())


def _top1(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """How many of the answers have the same first choice, in parts of one."""
    same = np.concatenate([(one.argmax(axis=-1) == other.argmax(axis=-1)).ravel() for one, other in pairs])
    return float(same.mean())


def _perplexity(logits: NDArray[Any], ids: NDArray[Any]) -> float:
    """Exp of the mean loss of a token; logits `[1, length, vocabulary]`, ids `[1, length]`."""
    losses = []
    for row, following in zip(logits[0, :-1], ids[0, 1:], strict=True):
        shifted = row.astype(np.float64) - float(row.max())
        losses.append(np.log(np.exp(shifted).sum()) - shifted[following])
    return float(np.exp(np.mean(losses)))
