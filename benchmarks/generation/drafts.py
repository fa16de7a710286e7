"""A model that drafts for itself, beside the same model without its draft, in the same memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

import pipeload_export
from benchmarks.generation.bits import PROMPT, SEEDED
from benchmarks.generation.limited import files_of, profile, run_program
from benchmarks.generation.lookup import PROMPTS
from benchmarks.generation.weights import checkpoint
from benchmarks.models import ROOT
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.errors import RunError
from pipeload.format.manifest import MANIFEST_NAME, read
from pipeload.machine.sizes import format_bytes

__all__ = ["MODELS", "Measured", "Report", "compare", "rows"]

_REAL = "smollm2-135m"
MODELS = (_REAL, SEEDED)
_QUESTIONS = ("Write a short story about a lighthouse.", "Explain how a bicycle stays upright.")
_TOKENS = {_REAL: 64, SEEDED: 16}
"""Of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model.

    Attributes:
        model: its name.
        weight_bytes, draft_weight_bytes: of the model, and of its draft.
        top1: how often the draft's first choice was the source's, when the model was exported.
        percents: memory beyond what the process takes without weights, in percent of `weight_bytes`.
        plain, drafted: for each of these the reports of `programs/drafted_texts.py`, round after round, in turn.
    """

    model: str
    weight_bytes: int
    draft_weight_bytes: int
    top1: float | None
    percents: tuple[int, ...]
    plain: tuple[tuple[dict[str, Any], ...], ...]
    drafted: tuple[tuple[dict[str, Any], ...], ...]

    @property
    def ok(self) -> bool:
        """The draft changed no token."""
        runs = [*sum(self.plain, ()), *sum(self.drafted, ())]
        return all(_tokens(run) == _tokens(runs[0]) for run in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The measurement.

    Attributes:
        machine: the one that it ran on.
        disk_bytes_per_s: throttle of the disk.
        models: what was measured of each.
    """

    machine: dict[str, Any]
    disk_bytes_per_s: int
    models: tuple[Measured, ...]

    @property
    def ok(self) -> bool:
        """No draft changed a token."""
        return all(model.ok for model in self.models)


def compare(
    models: tuple[str, ...], *, percents: tuple[int, ...], rounds: int, disk_bytes_per_s: int, console: Console
) -> Report:
    """Continue prompts without the draft and with it, in turn.

    Raises:
        RunError: one of them did not run.
    """
    found = tuple(_measure(name, percents, rounds, disk_bytes_per_s, console) for name in models)
    return Report(machine=machine_facts(), disk_bytes_per_s=disk_bytes_per_s, models=found)


def _measure(name: str, percents: tuple[int, ...], rounds: int, disk_bytes_per_s: int, console: Console) -> Measured:
    directory = _exported(name, console)
    manifest = read(directory)
    assert manifest.draft is not None
    plain: list[tuple[dict[str, Any], ...]] = []
    drafted: list[tuple[dict[str, Any], ...]] = []
    with tempfile.TemporaryDirectory(prefix="pipeload-generation-") as folder:
        profile(directory, disk_bytes_per_s, Path(folder))
        for percent in percents:
            order = {
                "model": str(directory),
                "weights_bytes": manifest.weight_bytes * percent // 100,
                "tokens": _TOKENS[name],
                **_prompts(name),
            }
            runs: dict[str | None, list[dict[str, Any]]] = {None: [], "auto": []}
            for _ in range(rounds):
                for draft, found in runs.items():
                    done = run_program(
                        "drafted_texts",
                        {**order, "draft": draft},
                        files=files_of(directory),
                        read_bytes_per_s=disk_bytes_per_s,
                        cache=Path(folder),
                    )
                    if done.answer is None:
                        raise RunError(f"{name}, {percent} %, draft={draft}: {done.message}")
                    found.append(done.answer)
                    console.print(f"{name} {percent} % draft={draft}: {_seconds(done.answer):.1f} s", highlight=False)
            plain.append(tuple(runs[None]))
            drafted.append(tuple(runs["auto"]))
    return Measured(
        model=f"{name.removesuffix('-bf16')} bf16",
        weight_bytes=manifest.weight_bytes,
        draft_weight_bytes=manifest.draft.nbytes,
        top1=manifest.draft.top1,
        percents=percents,
        plain=tuple(plain),
        drafted=tuple(drafted),
    )


def _prompts(name: str) -> dict[str, Any]:
    """Questions for the real model; ids for seeded weights, which have no tokenizer."""
    if name == _REAL:
        return {"questions": [PROMPTS["summary"].read_text().strip(), *_QUESTIONS]}
    return {"prompts": [PROMPT[:16], PROMPT[8:24]]}


def rows(report: Report) -> str:
    """The table of the page."""
    lines = [_row(model, at) for model in report.models for at in range(len(model.percents))]
    names = ("model", "memory", "of it the draft", "tokens/sweep", "guesses right", "s/token without", "with")
    return markdown_table((*names, "speed, without = 1", "of each round", "peak", "budget", "same tokens"), lines)


def _row(model: Measured, at: int) -> list[str]:
    plain, drafted = model.plain[at], model.drafted[at]
    texts = drafted[-1]["texts"]
    tokens, sweeps = sum(len(t["token_ids"]) for t in texts), sum(t["sweeps"] for t in texts)
    right, guessed = (sum(t[name] for t in texts) for name in ("accepted_tokens", "drafted_tokens"))
    speeds = [_seconds(one) / _seconds(other) for one, other in zip(plain, drafted, strict=True)]
    return [
        model.model,
        f"{model.percents[at]} %",
        format_bytes(drafted[-1]["draft_bytes"]),
        f"{tokens / sweeps:.2f}",
        f"{right / guessed:.0%}" if guessed else "-",
        f"{median(_seconds(one) for one in plain) / tokens:.2f} s",
        f"{median(_seconds(one) for one in drafted) / tokens:.2f} s",
        f"{median(speeds):.2f}",
        f"{min(speeds):.2f} - {max(speeds):.2f}",
        format_bytes(max(one["peak_bytes"] for one in drafted)),
        format_bytes(drafted[-1]["budget_bytes"]),
        "yes" if all(_tokens(one) == _tokens(plain[0]) for one in (*plain, *drafted)) else "NO",
    ]


def _seconds(run: dict[str, Any]) -> float:
    return float(sum(text["seconds"] for text in run["texts"]))


def _tokens(run: dict[str, Any]) -> list[list[int]]:
    return [list(text["token_ids"]) for text in run["texts"]]


def _exported(name: str, console: Console) -> Path:
    directory = ROOT / "models" / "exported" / f"{name.removesuffix('-bf16')}-bf16-draft"
    if not (directory / MANIFEST_NAME).exists():
        console.print(f"Exporting {name} to {directory.relative_to(ROOT)} ...")
        source = f"catalog:{name}" if name == _REAL else checkpoint(console, name)
        pipeload_export.export(source, directory, weights="bf16", draft="int4")
    return directory
