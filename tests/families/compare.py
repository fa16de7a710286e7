"""One family: a checkpoint -> the export -> streamed answers, held against those of transformers.

```
checkpoint, export    a process with torch      -> FOLDER/checkpoint, FOLDER/model
answers of the source a process with torch      -> cases.npz, source.npz, source.json, prompts.json
streamed answers      a process without torch   -> streamed.npz, streamed.json
```
Each step has a process of its own, so that one that crashes or hangs is recorded as such. Those with torch are forked
from a server that has imported it once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from tests.families.catalog import FAMILIES

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.closeness import range_of

LIMIT = 1e-4
"""The largest difference from the source, over the range of its answer."""
TIMEOUT_S = 180
_CHARACTERS = 400
_LIBRARIES = ["transformers.modeling_utils", "optimum.exporters.onnx", "onnx", "onnxruntime"]


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one family did.

    Attributes:
        verdict: all answers are those of the source; or it was refused; or anything else.
        reason: of a refusal or of wrong answers.
        blocks: shards of the role "block".
        streamed_bytes: weights read in every pass, under the smallest budget.
        cases: sizes of inputs that were compared.
        worst: largest difference over the range of the answer, and `worst_case` where.
        tokens: greedy tokens that are those of the source, and `tokens_of` how many there were.
        refused_cases: calls that pipeload refuses and transformers answers -> the reason.
    """

    verdict: Literal["right", "refused", "wrong"]
    reason: str = ""
    blocks: int = 0
    streamed_bytes: int = 0
    cases: int = 0
    worst: float = 0.0
    worst_case: str = ""
    tokens: int = 0
    tokens_of: int = 0
    refused_cases: dict[str, str] = {}
    seconds: int = 0


class _Stop(Exception):  # noqa: N818
    """The result is known."""

    def __init__(self, verdict: Literal["refused", "wrong"], reason: str) -> None:
        self.verdict: Literal["refused", "wrong"] = verdict
        self.reason = " ".join(reason.split())[:_CHARACTERS]
        super().__init__(reason)


def compare(name: str, folder: Path, timeout_s: float = TIMEOUT_S) -> Result:
    """Make, export, stream and compare a family in a folder, which is emptied first."""
    begin = time.monotonic()
    deadline = begin + timeout_s
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    blocks = 0
    try:
        _in_process(_export, name, folder, deadline)
        blocks = sum(shard.role == "block" for shard in manifests.read(folder / "model").shards)
        _in_process(_ask_source, name, folder, deadline)
        _stream(folder, deadline)
        result = _held_together(folder, blocks)
    except _Stop as stop:
        result = Result(verdict=stop.verdict, reason=stop.reason, blocks=blocks)
    return msgspec.structs.replace(result, seconds=round(time.monotonic() - begin))


def _export(name: str, folder: Path) -> None:
    from tests.families.checkpoints import write_checkpoint
    from tests.models import traced_here

    from pipeload_export import export

    family = FAMILIES[name]
    write_checkpoint(family, folder / "checkpoint")
    try:
        with traced_here():
            export(folder / "checkpoint", folder / "model", task=family.task)
    except pipeload.PipeloadError as error:
        raise _Stop("refused", f"{error}".replace(str(folder / "checkpoint"), "checkpoint")) from error
    except Exception:  # noqa: BLE001 - the exporter's child makes a message of whatever the libraries raise
        try:
            export(folder / "checkpoint", folder / "model", task=family.task)
        except pipeload.PipeloadError as error:
            raise _Stop("refused", f"{error}") from error


def _ask_source(name: str, folder: Path) -> None:
    from tests.families.source import answers, greedy

    family, manifest = FAMILIES[name], manifests.read(folder / "model")
    names = [spec.name for spec in manifest.free_inputs]
    found, refused = answers(family, folder / "checkpoint", names, [spec.name for spec in manifest.free_outputs])
    inputs, outputs = (
        {f"{number}.{key}": array for number, triple in enumerate(found) for key, array in triple[place].items()}
        for place in (1, 2)
    )
    np.savez(folder / "cases.npz", **inputs)
    np.savez(folder / "source.npz", **outputs)
    texts = greedy(family, folder / "checkpoint") if family.task == "text-generation" else []
    (folder / "prompts.json").write_text(json.dumps([prompt for prompt, _, _ in texts]))
    facts = {"cases": [case.name for case, _, _ in found], "refused": refused, "greedy": texts}
    (folder / "source.json").write_text(json.dumps(facts))


def _in_process(step: Callable[[str, Path], None], name: str, folder: Path, deadline: float) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    outcome = folder / f"{step.__name__}.json"
    process = context.Process(target=_carry_out, args=(step, name, folder, outcome))
    process.start()
    process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        raise _Stop("wrong", f"{step.__name__.strip('_')} did not end within {TIMEOUT_S} s")
    if not outcome.exists():
        raise _Stop("wrong", f"{step.__name__.strip('_')} crashed with exit code {process.exitcode}")
    if found := json.loads(outcome.read_text()):
        raise _Stop(*found)


def _carry_out(step: Callable[[str, Path], None], name: str, folder: Path, outcome: Path) -> None:
    """In the process: run a step, and write down how it ended."""
    import warnings

    warnings.simplefilter("ignore")
    with open(folder / "log.txt", "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    found: list[str] = []
    try:
        step(name, folder)
    except _Stop as stop:
        found = [stop.verdict, stop.reason]
    except Exception as error:  # noqa: BLE001 - the parent records it
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = ["wrong", f"{step.__name__.strip('_')}: {type(error).__name__}: {error} ({where.name}:{where.lineno})"]
    outcome.write_text(json.dumps(found))


def _stream(folder: Path, deadline: float) -> None:
    command = [sys.executable, "-m", "tests.families.stream", str(folder)]
    caches = {"PIPELOAD_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command,
            env=os.environ | caches,
            timeout=max(1.0, deadline - time.monotonic()),
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise _Stop("wrong", f"exported, but streaming it did not end within {TIMEOUT_S} s") from error
    (folder / "stream.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _Stop("wrong", f"exported, but streaming it ends in: {last}")


def _held_together(folder: Path, blocks: int) -> Result:
    source, streamed = (json.loads((folder / name).read_text()) for name in ("source.json", "streamed.json"))
    refused = {source["cases"][int(number)]: reason for number, reason in streamed["refused"].items()}
    worst, worst_case = 0.0, ""
    with np.load(folder / "source.npz") as ours, np.load(folder / "streamed.npz") as theirs:
        with np.load(folder / "cases.npz") as cases:
            spans = _spans(ours)
            for key in ours.files:
                number, output = key.split(".", 1)
                case = source["cases"][int(number)]
                if case in refused:
                    continue
                mask = cases.get(f"{number}.attention_mask", None)
                found = difference(ours[key], theirs[key], mask, spans.get(output))
                if found > worst:
                    worst, worst_case = found, f"{output} at {case}"
    tokens, tokens_of, parted = 0, 0, ""
    for place, (prompt, expected, gaps) in enumerate(source["greedy"]):
        batch = streamed["batch"]
        made = {"alone": streamed["greedy"][place]}
        if batch is not None:
            made["in a batch"] = batch[place : place + 1] if isinstance(batch, list) else batch
        for how, texts in made.items():
            if isinstance(texts, str):
                refused[f"generate {how}" + ("" if how == "in a batch" else f", {len(prompt)} tokens")] = texts
                continue
            equal, of = same_tokens(expected, texts[0], gaps)
            tokens, tokens_of = tokens + equal, tokens_of + of
            if equal < of and not parted:
                parted = f"text after {len(prompt)} tokens {how} parts at token {equal}"
    reasons = [parted] if parted else []
    if not worst <= LIMIT:
        reasons.insert(0, f"{worst:.2g} of the range off in {worst_case}")
    if not source["cases"]:
        reasons.append(f"transformers itself answers no case: {source['refused']}")
    everything = len(source["cases"]) == sum(case in refused for case in source["cases"])
    if everything and not reasons:
        return Result(
            verdict="wrong",
            reason=f"exported, but every call is refused: {next(iter(refused.values()))}"[:_CHARACTERS],
            blocks=blocks,
        )
    return Result(
        verdict="wrong" if reasons else "right",
        reason="; ".join(reasons)[:_CHARACTERS],
        blocks=blocks,
        streamed_bytes=streamed["streamed_bytes"],
        cases=len(source["cases"]) - sum(case in refused for case in source["cases"]),
        worst=float(worst),
        worst_case=worst_case,
        tokens=tokens,
        tokens_of=tokens_of,
        refused_cases={case: reason[:_CHARACTERS] for case, reason in refused.items()},
    )


def _spans(arrays: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """The range of each output over all cases: that of a case with seven numbers may be as small as their rounding."""
    ends: dict[str, list[float]] = {}
    for key, array in arrays.items():
        finite = array[np.isfinite(array)]
        if finite.size:
            ends.setdefault(key.split(".", 1)[1], []).extend((float(finite.min()), float(finite.max())))
    return {output: range_of(np.array(found), "float32") for output, found in ends.items()}


def difference(
    expected: NDArray[Any], given: NDArray[Any], mask: NDArray[Any] | None, span: float | None = None
) -> float:
    """The largest difference, of what the mask keeps, over the output's range; None takes the expected values'."""
    if expected.shape != given.shape:
        return float("inf")
    if mask is not None and expected.shape[:2] == mask.shape:
        expected, given = expected[mask == 1], given[mask == 1]
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(given)):
        return float("inf")
    if not finite.any():
        return 0.0
    expected, given = expected[finite].astype(np.float64), given[finite].astype(np.float64)
    largest = float(np.abs(expected - given).max())
    return largest / (span or range_of(expected, "float32"))


def same_tokens(expected: list[int], given: list[int], gaps: list[float]) -> tuple[int, int]:
    """How many tokens are those expected, and of how many: to the first whose two best logits are nearly equal."""
    for place, (one, other, gap) in enumerate(zip(expected, given, gaps, strict=False)):
        if one != other:
            return (place, place) if gap <= LIMIT else (place, len(expected))
    return min(len(expected), len(given)), len(expected)
