"""Tokens of a large model under memory caps, beside the time in which the disk gives what does not stay in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.generation.limited import files_of, profile, run_program
from benchmarks.study import markdown_table
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.machine.sizes import format_bytes

__all__ = ["Tokens", "generate", "token_rows"]

_CAPS = (1_000_000_000, 2_000_000_000, 4_000_000_000)
_DISK_BYTES_PER_S = 400_000_000
_PROMPT = (464, 3139, 286, 4881, 318, 6342, 11, 290)
_THREADS = 2
_SETTLING, _TOKENS = 2, 3
"""Tokens after the first that do not count; those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One model under one cap.

    Attributes:
        weights: its bits.
        cap_bytes: limit of the memory cgroup, page cache included.
        weight_bytes, resident_bytes: of all weights, and of those that stay in memory.
        token_s: median of the tokens that count.
        bound_s: (weights - resident) / throttle.
        peak_bytes: of the cgroup.
        token_ids: the answer, which is the same under every cap.
    """

    weights: str
    cap_bytes: int
    weight_bytes: int
    resident_bytes: int
    token_s: float
    bound_s: float
    peak_bytes: int
    token_ids: tuple[int, ...]


def generate(weights: str, directory: Path, console: Console) -> Iterator[Tokens]:
    """Run the model under each cap, with the disk throttled.

    Raises:
        RunError: it did not run, or its tokens depend on the cap.
    """
    known: tuple[int, ...] | None = None
    with tempfile.TemporaryDirectory(prefix="pipeload-large-") as folder:
        profile(directory, _DISK_BYTES_PER_S, Path(folder))
        for cap in _CAPS:
            done = run_program(
                "pipeload_tokens",
                {
                    "model": str(directory),
                    "prompt": _PROMPT,
                    "tokens": 1 + _SETTLING + _TOKENS,
                    "threads": _THREADS,
                },
                files=files_of(directory),
                memory_bytes=cap,
                read_bytes_per_s=_DISK_BYTES_PER_S,
                cache=Path(folder),
            )
            if done.answer is None or "refused" in done.answer:
                raise RunError(f"{weights} in {format_bytes(cap)}: {done.message or (done.answer or {})['refused']}")
            found = done.answer
            made = tuple(found["token_ids"])
            known = known or made
            if made != known:
                raise RunError(f"{weights} made other tokens in {format_bytes(cap)}.")
            assert done.peak_bytes is not None
            one = Tokens(
                weights=weights,
                cap_bytes=cap,
                weight_bytes=found["weight_bytes"],
                resident_bytes=found["resident_bytes"],
                token_s=median(found["seconds"][1 + _SETTLING :]),
                bound_s=(found["weight_bytes"] - found["resident_bytes"]) / _DISK_BYTES_PER_S,
                peak_bytes=done.peak_bytes,
                token_ids=made,
            )
            console.print(f"{weights} {format_bytes(cap)}: {seconds(one.token_s)}", highlight=False)
            yield one


def token_rows(records: Sequence[Mapping[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        [
            one["weights"],
            *(format_bytes(one[key]) for key in ("cap_bytes", "weight_bytes", "resident_bytes")),
            seconds(one["token_s"]),
            seconds(one["bound_s"]),
            f"{one['bound_s'] / one['token_s']:.2f}",
            format_bytes(one["peak_bytes"]),
        ]
        for one in records
    ]
    names = ("weights", "cap", "bytes", "resident", "s/token", "(W - R)/B", "(W - R)/B : s/token", "peak")
    return markdown_table(names, lines)
