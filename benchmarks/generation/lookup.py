"""Guessed tokens: prompts whose answers repeat parts of them, with and without `prompt_lookup_num_tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.generation.small import SmallModel
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds

__all__ = ["Report", "compare", "rows"]

PROMPTS = {path.stem: path for path in sorted(Path(__file__).with_name("prompts").glob("*.txt"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The measurement.

    Attributes:
        machine: the one that it ran on.
        cap_bytes, disk_bytes_per_s: the limits.
        lookup: most tokens that are guessed in a sweep.
        names: of the prompts.
        plain, guessed: the reports of `programs/texts.py`, without and with guesses.
    """

    machine: dict[str, Any]
    cap_bytes: int
    disk_bytes_per_s: int | None
    lookup: int
    names: tuple[str, ...]
    plain: dict[str, Any]
    guessed: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Guesses changed no token."""
        return [text["token_ids"] for text in self.plain["texts"]] == [
            text["token_ids"] for text in self.guessed["texts"]
        ]


def compare(model: SmallModel, tokens: int, lookup: int) -> Report:
    """Answer every prompt without guesses, then with them.

    Args:
        model: and its limits.
        tokens: most tokens of an answer.
        lookup: most tokens that are guessed in a sweep.
    """
    order = {"prompts": [path.read_text().strip() for path in PROMPTS.values()], "chat": True}
    options = {"max_new_tokens": tokens}
    return Report(
        machine=machine_facts(),
        cap_bytes=model.cap_bytes,
        disk_bytes_per_s=model.disk_bytes_per_s,
        lookup=lookup,
        names=tuple(PROMPTS),
        plain=model.run("texts", order | {"options": options}),
        guessed=model.run("texts", order | {"options": options | {"prompt_lookup_num_tokens": lookup}}),
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    for name, plain, guessed in zip(report.names, report.plain["texts"], report.guessed["texts"], strict=True):
        for kind, told in (("without", plain), (f"with, up to {report.lookup}", guessed)):
            tokens = len(told["token_ids"])
            lines.append(
                [
                    name,
                    kind,
                    str(tokens),
                    str(told["sweeps"]),
                    f"{tokens / told['sweeps']:.2f}",
                    seconds(told["seconds"]),
                    f"{plain['seconds'] / told['seconds']:.2f}",
                    "yes" if told["token_ids"] == plain["token_ids"] else "NO",
                ]
            )
    names = ("prompt", "guesses", "tokens", "sweeps", "tokens/sweep", "time", "speed, without = 1", "same tokens")
    return markdown_table(names, lines)
