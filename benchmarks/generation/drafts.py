"""A model that drafts for itself, beside the same model without its draft, in the same memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

import pipeload_export
from benchmarks.generation.limited import files_of, profile, run_program
from benchmarks.generation.lookup import PROMPTS
from benchmarks.models import ROOT
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.errors import RunError
from pipeload.format.manifest import MANIFEST_NAME, read
from pipeload.machine.sizes import format_bytes

__all__ = ["Report", "compare", "rows"]

_MODEL = "smollm2-135m"
_QUESTIONS = ("Write a short story about a lighthouse.", "Explain how a bicycle stays upright.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The measurement.

    Attributes:
        machine: the one that it ran on.
        model: its name.
        weight_bytes, draft_weight_bytes: of the model, and of its draft.
        top1: how often the draft's first choice was the source's, when the model was exported.
        disk_bytes_per_s: throttle of the disk.
        percents: memory beyond what the process takes without weights, in percent of `weight_bytes`.
        plain, drafted: for each of these the reports of `programs/drafted_texts.py`, round after round, in turn.
    """

    machine: dict[str, Any]
    model: str
    weight_bytes: int
    draft_weight_bytes: int
    top1: float | None
    disk_bytes_per_s: int
    percents: tuple[int, ...]
    plain: tuple[tuple[dict[str, Any], ...], ...]
    drafted: tuple[tuple[dict[str, Any], ...], ...]

    @property
    def ok(self) -> bool:
        """The draft changed no token."""
        runs = [*sum(self.plain, ()), *sum(self.drafted, ())]
        return all(_tokens(run) == _tokens(runs[0]) for run in runs)


def compare(*, percents: tuple[int, ...], tokens: int, rounds: int, disk_bytes_per_s: int, console: Console) -> Report:
    """Answer questions without the draft and with it, in turn.

    Raises:
        RunError: one of them did not run.
    """
    directory = _exported(console)
    manifest = read(directory)
    assert manifest.draft is not None
    plain: list[tuple[dict[str, Any], ...]] = []
    drafted: list[tuple[dict[str, Any], ...]] = []
    with tempfile.TemporaryDirectory(prefix="pipeload-generation-") as folder:
        profile(directory, disk_bytes_per_s, Path(folder))
        for percent in percents:
            order = {
                "model": str(directory),
                "prompts": [PROMPTS["summary"].read_text().strip(), *_QUESTIONS],
                "weights_bytes": manifest.weight_bytes * percent // 100,
                "tokens": tokens,
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
                        raise RunError(f"{percent} %, draft={draft}: {done.message}")
                    found.append(done.answer)
                    console.print(f"{percent} % draft={draft}: {_seconds(done.answer):.1f} s", highlight=False)
            plain.append(tuple(runs[None]))
            drafted.append(tuple(runs["auto"]))
    return Report(
        machine=machine_facts(),
        model=f"{_MODEL} bf16",
        weight_bytes=manifest.weight_bytes,
        draft_weight_bytes=manifest.draft.nbytes,
        top1=manifest.draft.top1,
        disk_bytes_per_s=disk_bytes_per_s,
        percents=percents,
        plain=tuple(plain),
        drafted=tuple(drafted),
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    for percent, plain, drafted in zip(report.percents, report.plain, report.drafted, strict=True):
        texts = drafted[-1]["texts"]
        tokens, sweeps = sum(len(t["token_ids"]) for t in texts), sum(t["sweeps"] for t in texts)
        right, guessed = (sum(t[name] for t in texts) for name in ("accepted_tokens", "drafted_tokens"))
        speeds = [_seconds(one) / _seconds(other) for one, other in zip(plain, drafted, strict=True)]
        lines.append(
            [
                report.model,
                f"{percent} %",
                format_bytes(drafted[-1]["draft_bytes"]),
                f"{tokens / sweeps:.2f}",
                f"{right / guessed:.0%}" if guessed else "-",
                f"{median(speeds):.2f}",
                f"{min(speeds):.2f} - {max(speeds):.2f}",
                format_bytes(max(one["peak_bytes"] for one in drafted)),
                format_bytes(drafted[-1]["budget_bytes"]),
                "yes" if all(_tokens(one) == _tokens(plain[0]) for one in (*plain, *drafted)) else "NO",
            ]
        )
    names = ("model", "memory", "of it the draft", "tokens/sweep", "guesses right", "speed, without = 1")
    return markdown_table((*names, "of each round", "peak", "budget", "same tokens"), lines)


def _seconds(run: dict[str, Any]) -> float:
    return float(sum(text["seconds"] for text in run["texts"]))


def _tokens(run: dict[str, Any]) -> list[list[int]]:
    return [list(text["token_ids"]) for text in run["texts"]]


def _exported(console: Console) -> Path:
    directory = ROOT / "models" / "exported" / f"{_MODEL}-bf16-draft"
    if not (directory / MANIFEST_NAME).exists():
        console.print(f"Exporting {_MODEL} to {directory.relative_to(ROOT)} ...")
        pipeload_export.export(f"catalog:{_MODEL}", directory, weights="bf16", draft="int4")
    return directory
