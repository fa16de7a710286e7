"""Weights of 4 and 8 bits under memory caps and without: seconds of a token and of a prompt, beside llama.cpp.

Both engines round the same checkpoint, each in its own way, so their tokens may differ: an answer is right where it is
that of the same engine without a cap. A real model's GGUF file is read by both as it is; there perplexities tell.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.generation import weights
from benchmarks.generation.limited import Done, files_of, profile, python_of, run_program
from benchmarks.models import exported
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.format.manifest import read
from pipeload.machine.sizes import format_bytes
from pipeload_export.source.catalog import PackageRecipe, fetch_package, recipe

__all__ = ["Record", "Report", "compare", "rows"]

SEEDED, REAL = "gpt2-xl-bf16", "smollm2-135m"
PROMPT = (464, 3139, 286, 4881, 318, 6342, 11, 290, 262, 3139, 286, 4486, 318, 11307, 13, 383) * 4
"""64 ids."""
THREADS = 2
PERCENTS = (25, 50, 75)
_MAPPED = "llama.cpp, as stored"
_PROGRAMS = {"pipeload": "pipeload_tokens", "llama.cpp": "llama_tokens", _MAPPED: "llama_tokens"}
"""By default llama.cpp lays some types of blocks out for the processor, in other memory: faster, and not mapped."""
_PASSAGE_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The same weights as each engine has them.

    Attributes:
        name: of the model, with what pipeload calls the bits.
        paths: engine -> the sharded directory, or the GGUF file.
        percents: caps, in percent of pipeload's bytes.
        perplexities: engine -> over the exporter's passage; empty for seeded weights.
    """

    name: str
    paths: dict[str, Path]
    percents: Sequence[int]
    perplexities: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One engine's figures under one cap; None where there is no answer.

    Attributes:
        model, contender: see `Model`.
        cap_bytes: the cgroup's limit; None for none.
        weight_bytes: of the engine's own files.
        library: its name, with versions.
        first_s: from opening the model to its first token, imports left out.
        tokens_s, token_s: of each token that counts, and their median.
        prompt_s: of `PROMPT` once more, behind those tokens, in one pass.
        read_bytes: from the disk, per token that counts.
        peak_bytes: of the cgroup, page cache included.
        resident_bytes: weights that pipeload kept.
        token_ids: the answer.
        ok: it is that of the same engine without a cap.
        perplexity: see `Model`.
        killed, message: why there is no answer.
    """

    model: str
    contender: str
    cap_bytes: int | None
    weight_bytes: int
    library: str | None = None
    first_s: float | None = None
    tokens_s: tuple[float, ...] = ()
    token_s: float | None = None
    prompt_s: float | None = None
    read_bytes: int | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    token_ids: tuple[int, ...] = ()
    ok: bool = False
    perplexity: float | None = None
    killed: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the comparison.

    Attributes:
        machine: the one that it ran on.
        disk_bytes_per_s: the throttle of reads, with and without a cap.
        settling: tokens after the first that do not count.
        records: one for each engine, model and cap.
    """

    machine: dict[str, Any]
    disk_bytes_per_s: int
    settling: int
    records: tuple[Record, ...] = ()

    @property
    def ok(self) -> bool:
        """No engine changed its answer under a cap, and pipeload answered or refused every one."""
        answered = all(record.ok for record in self.records if record.token_ids)
        return answered and not any(record.killed for record in self.records if record.contender == "pipeload")


def compare(*, tokens: int, settling: int, disk_bytes_per_s: int, environments: Path, console: Console) -> Report:
    """Run both engines with every model, without a cap and then under each.

    Raises:
        RunError: llama.cpp is not installed, or an engine did not run without a cap.
    """
    llama = python_of("llama", environments)
    if not llama.exists():
        raise RunError(f"{llama} does not exist. The README says how to make it.")
    pythons = {"pipeload": Path(sys.executable), "llama.cpp": llama, _MAPPED: llama}
    records: list[Record] = []
    for model in (_real(llama, console), *_rounded(console)):
        nbytes = {name: _weight_bytes(path) for name, path in model.paths.items()}
        with tempfile.TemporaryDirectory(prefix="pipeload-generation-") as folder:
            profile(model.paths["pipeload"], disk_bytes_per_s, Path(folder))
            references: dict[str, tuple[int, ...]] = {}
            for cap in (None, *(nbytes["pipeload"] * percent // 100 for percent in model.percents)):
                for name, path in model.paths.items():
                    done = run_program(
                        _PROGRAMS[name],
                        {
                            "model": str(path),
                            "prompt": PROMPT,
                            "tokens": 1 + settling + tokens,
                            "threads": THREADS,
                            "again": True,
                            "as_stored": name == _MAPPED,
                        },
                        files=files_of(path),
                        python=pythons[name],
                        memory_bytes=cap,
                        read_bytes_per_s=disk_bytes_per_s,
                        cache=Path(folder),
                    )
                    record = summarise(model, name, cap, nbytes[name], done, settling)
                    if cap is None:
                        if not record.token_ids:
                            raise RunError(f"{name} did not run {model.name} without a cap: {record.message}")
                        references[name] = record.token_ids
                    record = replace(record, ok=record.token_ids == references[name])
                    size = format_bytes(cap) if cap else "no cap"
                    console.print(f"{model.name} {size:>8} {name:21}{_verdict(record)}", highlight=False)
                    records.append(record)
    return Report(machine=machine_facts(), disk_bytes_per_s=disk_bytes_per_s, settling=settling, records=tuple(records))


def summarise(model: Model, name: str, cap: int | None, nbytes: int, done: Done, settling: int) -> Record:
    """The record of one run, not yet held against the answer without a cap."""
    bare = Record(
        model=model.name,
        contender=name,
        cap_bytes=cap,
        weight_bytes=nbytes,
        peak_bytes=done.peak_bytes,
        perplexity=model.perplexities.get(name),
    )
    answer = done.answer
    if answer is None or "refused" in answer:
        return replace(bare, killed=done.killed, message=done.message if answer is None else answer["refused"])
    lap = 1 + settling
    return replace(
        bare,
        library=answer["library"],
        first_s=answer["seconds"][0],
        tokens_s=tuple(answer["seconds"][lap:]),
        token_s=median(answer["seconds"][lap:]),
        prompt_s=answer["again_s"],
        read_bytes=int(median(answer["read_bytes"][lap:])),
        resident_bytes=answer.get("resident_bytes"),
        token_ids=tuple(answer["token_ids"]),
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    for record in report.records:
        alike = [r for r in report.records if (r.model, r.cap_bytes) == (record.model, record.cap_bytes)]
        best_s = min((r.token_s for r in alike if r.token_s and r.contender != "pipeload"), default=None)
        ratio = best_s / record.token_s if best_s and record.token_s else None
        lines.append(
            [
                record.model,
                format_bytes(record.cap_bytes) if record.cap_bytes else "none",
                record.contender,
                format_bytes(record.weight_bytes),
                _verdict(record),
                f"{ratio:.2f}" if ratio and record.contender == "pipeload" else "-",
                f"{len(PROMPT) / record.prompt_s:.0f}" if record.prompt_s else "-",
                format_bytes(record.read_bytes) if record.read_bytes is not None else "-",
                format_bytes(record.peak_bytes) if record.peak_bytes else "-",
                f"{record.perplexity:.2f}" if record.perplexity else "-",
            ]
        )
    names = ("model", "cap", "engine", "weights", "s/token", "times llama.cpp's best speed", "tokens/s of a prompt")
    return markdown_table((*names, "read/token", "peak", "perplexity"), lines)


def _verdict(record: Record) -> str:
    if record.killed:
        return "killed"
    if record.token_s is None:
        return f"no: {(record.message or '').partition(':')[0]}"
    return seconds(record.token_s) if record.ok else f"wrong ({seconds(record.token_s)})"


def _rounded(console: Console) -> list[Model]:
    """The seeded checkpoint, rounded by each engine's own tools."""
    kinds: tuple[tuple[Any, str], ...] = (("int4", "Q4_0"), ("int8", "Q8_0"))
    return [
        Model(
            name=f"{SEEDED.removesuffix('-bf16')} {bits}, {kind}",
            paths=_paths(weights.rounded_shards(SEEDED, bits, console), weights.gguf_file(console, SEEDED, kind)),
            percents=PERCENTS,
        )
        for bits, kind in kinds
    ]


def _real(llama: Path, console: Console) -> Model:
    """A real model's GGUF file, as it is for both. It is smaller than the libraries: it is only run without a cap."""
    directory, _ = exported(REAL, console)
    found = recipe(REAL)
    assert isinstance(found, PackageRecipe)
    file = fetch_package(found.package) / found.model
    small = read(directory).small_weights
    assert small is not None
    assert small.accuracy is not None
    assert small.accuracy.perplexity is not None
    passage = files("pipeload_export.check").joinpath("passage.txt").read_text(encoding="utf-8").strip()
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(passage).ids[:_PASSAGE_TOKENS]
    order = {"model": str(file), "prompt": ids, "tokens": 0, "threads": THREADS}
    done = run_program("llama_perplexity", order, files=[file], python=llama)
    if done.answer is None:
        raise RunError(f"llama.cpp did not read {file}: {done.message}")
    return Model(
        name=f"{REAL} Q4_1",
        paths=_paths(directory, file),
        percents=(),
        perplexities={"pipeload": small.accuracy.perplexity, "llama.cpp": done.answer["perplexity"]},
    )


def _paths(directory: Path, file: Path) -> dict[str, Path]:
    return {name: directory if name == "pipeload" else file for name in _PROGRAMS}


def _weight_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else read(path).weight_bytes
