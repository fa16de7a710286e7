"""SmolLM2-135M, a real model, with weights of float32 and under limits that make it stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.generation.limited import files_of, profile, run_program
from benchmarks.models import exported
from pipeload.errors import RunError

__all__ = ["MODEL", "SmallModel", "small_model"]

MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallModel:
    """The model, and its limits.

    Attributes:
        directory: the sharded model directory.
        cap_bytes: limit of the memory cgroup, page cache included.
        disk_bytes_per_s: throttle of the disk; None for none.
        cache: pipeload's cache folder.
    """

    directory: Path
    cap_bytes: int
    disk_bytes_per_s: int | None
    cache: Path

    def run(self, program: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """The report of a program. Raises RunError if the program ends without one."""
        done = run_program(
            program,
            {"model": str(self.directory), **order},
            files=files_of(self.directory / "shards"),
            memory_bytes=self.cap_bytes,
            read_bytes_per_s=self.disk_bytes_per_s,
            cache=self.cache,
        )
        if done.answer is None:
            raise RunError(f"{program} did not run: {done.message}")
        return done.answer | {"peak_bytes": done.peak_bytes}


@contextmanager
def small_model(cap_bytes: int, disk_bytes_per_s: int | None, console: Console) -> Iterator[SmallModel]:
    """The model under limits, exported if it is missing, and profiled."""
    directory, _ = exported(MODEL, console, weights="fp32")
    with tempfile.TemporaryDirectory(prefix="pipeload-generation-") as folder:
        cache = Path(folder)
        profile(directory, disk_bytes_per_s, cache)
        yield SmallModel(directory=directory, cap_bytes=cap_bytes, disk_bytes_per_s=disk_bytes_per_s, cache=cache)
