"""Eight callers of one streamed model at once, beside one caller: one sweep over the weights serves all that wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.generation.small import SmallModel
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.machine.sizes import format_bytes

__all__ = ["Report", "compare", "rows"]

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "My favourite season is autumn because",
    "To bake bread, you need",
    "The moon is",
    "A good friend is someone who",
    "In the year 1900, people",
    "The largest animal in the sea is",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The measurement.

    Attributes:
        machine: the one that it ran on.
        cap_bytes, disk_bytes_per_s: the limits.
        tokens: for each caller.
        alone, at_once: the reports of `programs/texts.py`, prompts one after another and all at once.
    """

    machine: dict[str, Any]
    cap_bytes: int
    disk_bytes_per_s: int | None
    tokens: int
    alone: dict[str, Any]
    at_once: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Every caller got the tokens that it gets alone."""
        return [text["token_ids"] for text in self.alone["texts"]] == [
            text["token_ids"] for text in self.at_once["texts"]
        ]


def compare(model: SmallModel, tokens: int) -> Report:
    """Run all prompts one after another, then at once.

    Args:
        model: and its limits.
        tokens: for each prompt.
    """
    order = {"prompts": PROMPTS, "options": {"max_new_tokens": tokens, "eos_token_id": []}}
    return Report(
        machine=machine_facts(),
        cap_bytes=model.cap_bytes,
        disk_bytes_per_s=model.disk_bytes_per_s,
        tokens=tokens,
        alone=model.run("texts", order),
        at_once=model.run("texts", order | {"at_once": True}),
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    speeds = []
    for name, told in (("one after another", report.alone), ("at once", report.at_once)):
        tokens = sum(len(text["token_ids"]) for text in told["texts"])
        speeds.append(tokens / told["seconds"])
        lines.append(
            [
                f"{len(told['texts'])} callers, {name}",
                str(tokens),
                str(told["sweeps"]),
                seconds(told["seconds"]),
                f"{speeds[-1]:.2f}",
                f"{speeds[-1] / speeds[0]:.2f}",
                format_bytes(told["read_bytes"] / tokens),
                format_bytes(told["resident_bytes"]),
                "yes" if report.ok else "NO",
            ]
        )
    names = ("callers", "tokens", "sweeps", "time", "tokens/s", "speed, one = 1", "read/token", "resident")
    return markdown_table((*names, "same tokens"), lines)
