"""GPT-2 XL under memory caps on a slow disk: seconds and bytes per token, beside engines that others wrote.

Every engine has the same fp32 weights and prompt, two threads, a process and a cgroup of its own, and cold files. It
continues the prompt greedily; its tokens, and their log-probabilities, must be those of pipeload without a cap.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.generation import weights
from benchmarks.generation.limited import Done, files_of, profile, python_of, run_program
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.machine.sizes import format_bytes

__all__ = ["CONTENDERS", "Record", "Report", "compare", "rows", "summarise"]

PROMPT = (464, 3139, 286, 4881, 318, 6342, 11, 290, 262, 3139, 286, 4486, 318, 11307, 13, 383)
"""16 ids of GPT-2."""
THREADS = 2
TOLERANCE = 1e-2
"""Largest difference of a right token's log-probability. llama.cpp takes GELU from a table in fp16."""
SPARE_BYTES = 1_000_000_000
"""What accelerate is told to leave of the cap: for Python, torch, and the largest weight twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine and a way to use it.

    Attributes:
        program: in `programs/`.
        environment: its virtual environment; None for pipeload's own.
        spare_bytes: bytes of the cap that it is told to leave; None for an engine that is told nothing.
        copied: weights that stay are copied out of its memory-mapped file.
    """

    program: str
    environment: str | None = None
    spare_bytes: int | None = None
    copied: bool = False


CONTENDERS: dict[str, Contender] = {
    "pipeload": Contender(program="pipeload_tokens"),
    "llama.cpp": Contender(program="llama_tokens", environment="llama"),
    "accelerate": Contender(program="accelerate_tokens", environment="accelerate"),
    "accelerate-auto": Contender(program="accelerate_tokens", environment="accelerate", spare_bytes=SPARE_BYTES),
    "accelerate-copied": Contender(
        program="accelerate_tokens", environment="accelerate", spare_bytes=SPARE_BYTES, copied=True
    ),
    "airllm": Contender(program="airllm_tokens", environment="airllm"),
}
"""The README says how each is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One contender's figures under one cap; None where there is no answer.

    Attributes:
        contender, cap_bytes: its name, and the cgroup's limit.
        library: its name, with versions.
        first_s: from opening the model to its first token, imports left out.
        settling_s: seconds of each later token that does not count.
        tokens_s, token_s: of each token that counts, and their median.
        read_bytes: from the disk, per token that counts.
        peak_bytes: the cgroup's peak, page cache included.
        resident_bytes, bound_s: weights that pipeload kept, and the seconds in which the disk gives the others.
        token_ids, max_error: its answer, and the worst difference of a log-probability.
        ok: the answer is right.
        killed, message: why there is no answer.
    """

    contender: str
    cap_bytes: int
    library: str | None = None
    first_s: float | None = None
    settling_s: tuple[float, ...] = ()
    tokens_s: tuple[float, ...] = ()
    token_s: float | None = None
    read_bytes: int | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    bound_s: float | None = None
    token_ids: tuple[int, ...] = ()
    max_error: float | None = None
    ok: bool = False
    killed: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the comparison.

    Attributes:
        machine: the one that it ran on.
        weight_bytes: of the model.
        disk_bytes_per_s: the throttle of reads.
        settling: tokens after the first that do not count.
        records: one for each contender and cap.
    """

    machine: dict[str, Any]
    weight_bytes: int
    disk_bytes_per_s: int
    settling: int
    prompt: tuple[int, ...] = PROMPT
    records: tuple[Record, ...] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """No contender answered wrongly, and pipeload answered under every cap."""
        return all(record.ok or (record.contender != "pipeload" and not record.token_ids) for record in self.records)


def compare(
    names: Sequence[str],
    caps: Sequence[int],
    *,
    tokens: int,
    settling: int,
    disk_bytes_per_s: int,
    environments: Path,
    console: Console,
) -> Report:
    """Run every contender under every cap.

    Args:
        names: of `CONTENDERS`.
        caps: memory limits in bytes.
        tokens: that count.
        settling: tokens between the first one and those.
        disk_bytes_per_s: the throttle.
        environments: the folder with the virtual environments.
        console: names each step.

    Raises:
        RunError: pipeload did not run without a cap, so that answers cannot be checked; or an engine is not installed.
    """
    for environment in {CONTENDERS[name].environment for name in names} - {None}:
        if not python_of(str(environment), environments).exists():
            raise RunError(
                f"{python_of(str(environment), environments)} does not exist. The README says how to make it."
            )
    models = {name: _model_of(name, environments, console) for name in names}
    directory = weights.shards(console)
    count = 1 + settling + tokens
    with tempfile.TemporaryDirectory(prefix="pipeload-generation-") as folder:
        cache = Path(folder)

        def run(name: str, cap: int | None, resident_bytes: int = 0) -> Done:
            contender, model = CONTENDERS[name], models.get(name, directory)
            order = {"model": str(model), "prompt": PROMPT, "tokens": count, "threads": THREADS}
            python = python_of(contender.environment, environments) if contender.environment else Path(sys.executable)
            return run_program(
                contender.program,
                order | {"resident_bytes": resident_bytes, "copied": contender.copied},
                files=files_of(model),
                python=python,
                memory_bytes=cap,
                read_bytes_per_s=None if cap is None else disk_bytes_per_s,
                cache=cache,
            )

        console.print("pipeload without a cap: what the others are compared with ...")
        reference = run("pipeload", None).answer
        if reference is None or "refused" in reference:
            raise RunError("pipeload did not run without a cap, so that answers cannot be checked.")
        profile(directory, disk_bytes_per_s, cache)
        records = []
        for cap in caps:
            for name in names:
                spare = CONTENDERS[name].spare_bytes
                if spare is not None and cap <= spare:
                    continue
                done = run(name, cap, 0 if spare is None else cap - spare)
                record = summarise(name, cap, done, reference, settling, disk_bytes_per_s)
                console.print(f"{format_bytes(cap):>8} {name:18}{_verdict(record)}", highlight=False)
                records.append(record)
    return Report(
        machine=machine_facts(),
        weight_bytes=reference["weight_bytes"],
        disk_bytes_per_s=disk_bytes_per_s,
        settling=settling,
        records=tuple(records),
    )


def summarise(
    name: str, cap: int, done: Done, reference: dict[str, Any], settling: int, disk_bytes_per_s: int
) -> Record:
    """The record of one run, its answer held against the reference."""
    answer = done.answer
    if answer is None or "refused" in answer:
        message = done.message if answer is None else answer["refused"]
        return Record(contender=name, cap_bytes=cap, peak_bytes=done.peak_bytes, killed=done.killed, message=message)
    lap = 1 + settling
    resident = answer.get("resident_bytes")
    errors = [abs(got - wanted) for got, wanted in zip(answer["logprobs"], reference["logprobs"], strict=True)]
    same = answer["token_ids"] == reference["token_ids"]
    return Record(
        contender=name,
        cap_bytes=cap,
        library=answer["library"],
        first_s=answer["seconds"][0],
        settling_s=tuple(answer["seconds"][1:lap]),
        tokens_s=tuple(answer["seconds"][lap:]),
        token_s=median(answer["seconds"][lap:]),
        read_bytes=int(median(answer["read_bytes"][lap:])),
        peak_bytes=done.peak_bytes,
        resident_bytes=resident,
        bound_s=None if resident is None else (reference["weight_bytes"] - resident) / disk_bytes_per_s,
        token_ids=tuple(answer["token_ids"]),
        max_error=max(errors),
        ok=same and max(errors) <= TOLERANCE,
        message=None if same else f"tokens {answer['token_ids']} instead of {reference['token_ids']}",
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    for record in report.records:
        ours = next(r for r in report.records if (r.contender, r.cap_bytes) == ("pipeload", record.cap_bytes))
        slower = record.token_s / ours.token_s if record.token_s and ours.token_s else None
        lines.append(
            [
                format_bytes(record.cap_bytes),
                record.contender,
                _verdict(record),
                format_bytes(record.read_bytes) if record.read_bytes is not None else "-",
                seconds(record.bound_s),
                f"{record.token_s / record.bound_s:.2f}" if record.token_s and record.bound_s else "-",
                f"{slower:.2f}" if slower and record is not ours else "-",
                seconds(record.first_s),
                format_bytes(record.peak_bytes) if record.peak_bytes else "-",
                f"{record.max_error:.0e}" if record.max_error is not None else "-",
            ]
        )
    names = ("cap", "engine", "s/token", "read/token", "(W - R)/B", "s/token : (W - R)/B", "pipeload's = 1")
    return markdown_table((*names, "first token", "peak", "max error"), lines)


def _verdict(record: Record) -> str:
    if record.killed:
        return "killed"
    if record.token_s is None:
        return f"failed: {record.message}"
    return seconds(record.token_s) if record.ok else f"wrong ({seconds(record.token_s)})"


def _model_of(name: str, environments: Path, console: Console) -> Path:
    made: dict[str, Callable[[], Path]] = {
        "pipeload_tokens": lambda: weights.shards(console),
        "llama_tokens": lambda: weights.gguf_file(console),
        "accelerate_tokens": lambda: weights.checkpoint(console),
        "airllm_tokens": lambda: weights.airllm_layers(console, environments),
    }
    return made[CONTENDERS[name].program]()
