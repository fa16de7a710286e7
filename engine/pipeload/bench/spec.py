"""The order to a contender's process, and its report: two records that travel as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

__all__ = ["CONTENDERS", "ContenderName", "PlanFacts", "Result", "Spec", "Task", "Unsplit", "from_json", "to_json"]

Message = TypeVar("Message")

ContenderName = Literal["pipeload", "single", "mmap", "layerwise", "standard", "pipeswitch"]
CONTENDERS: dict[ContenderName, str] = {
    "pipeload": "this engine",
    "single": "one onnxruntime session, all defaults",
    "mmap": "one session, weights memory-mapped (external data, session.disable_prepacking)",
    "layerwise": "a default session for each shard, one after the other",
    "standard": "the same with one thread that loads one shard ahead; a shard that ran is freed",
    "pipeswitch": "the same, but shards are freed at the end of the pass, as PipeSwitch does",
}
"""All contenders, with their descriptions."""

Task = Literal["pass", "decode", "embed", "generate"]
"""`pass`: seeded arrays through the graph; `decode`: a seeded prompt, then a token a pass; else a task of pipeload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsplit:
    """The same model as one graph.

    Attributes:
        graph: the `.onnx` file.
        folder: the folder to which the locations of its external data are relative.
    """

    graph: Path
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One contender's work.

    Attributes:
        contender: its name.
        directory: the sharded model directory.
        unsplit: the same model as one graph; for `single` and `mmap`.
        task: the work; see `Task`.
        budget: pipeload's `memory_budget`; only the cgroup limits the others.
        profile: a JSON file with the profile for pipeload's plan; None lets pipeload look for one itself.
        loaders: the number of pipeload's Loading Agents; None lets it choose.
        threads: intra-op threads; None takes every core, or lets pipeload choose.
        settling: passes after the first that do not count: during them, pipeload lays resident weights out for the CPU.
        passes: the number of steady passes after those.
        cold: evict the weights from the page cache before every pass.
        sizes: sizes of symbolic dimensions.
        texts: the texts that `embed` embeds, or `generate` continues.
        prompt: token ids for `generate`, instead of a text.
        outputs: the `.npz` file for the outputs.
    """

    contender: ContenderName
    directory: Path
    unsplit: Unsplit | None = None
    task: Task = "pass"
    budget: int | str = "auto"
    profile: Path | None = None
    loaders: int | None = None
    threads: int | None = None
    settling: int = 0
    passes: int = 5
    cold: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    outputs: Path | None = None

    def weight_files(self) -> list[Path]:
        """Files that hold weights, to evict from the page cache before a cold run."""
        files = [*(self.directory / "shards").iterdir()]
        if self.unsplit:
            # An unsplit graph's external data lie beside it, unless it shares the shards' files.
            files += [self.unsplit.graph, *self.unsplit.graph.parent.glob(f"{self.unsplit.graph.stem}*data*")]
        return files


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """The figures of pipeload's plan, for comparison with the measurements.

    Attributes:
        budget_bytes, peak_bytes: for the whole process.
        first_s, steady_s: predicted times of a cold and a steady pass; None when the machine was not measured.
        resident_bytes: weights that stay between passes.
        loaders, buffers, threads: of the pipeline.
        packed: whether resident shards were laid out for the CPU.
    """

    budget_bytes: int
    peak_bytes: int
    first_s: float | None
    steady_s: float | None
    resident_bytes: int
    loaders: int
    buffers: int
    threads: int
    packed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The measurements of one contender's process.

    Attributes:
        first_s: from opening the model to its first answer, imports left out; None when there is an error.
        passes_s: seconds of each steady pass (for `generate`: per token).
        read_bytes: from the disk, per steady pass.
        before_bytes: RSS before the model was opened.
        peak_rss_bytes: of the process.
        answer: a result for a human reader: token ids, a text, similarities.
        plan: pipeload's plan; None for other contenders.
        error: the message, when pipeload refused.
    """

    first_s: float | None = None
    passes_s: tuple[float, ...] = ()
    read_bytes: int | None = None
    before_bytes: int = 0
    peak_rss_bytes: int = 0
    answer: Any = None
    plan: PlanFacts | None = None
    error: str | None = None


def to_json(value: object) -> bytes:
    """A record as JSON; paths become texts."""
    return msgspec.json.encode(value, enc_hook=str)


def from_json(data: bytes | str, kind: type[Message]) -> Message:
    """The record that `to_json` wrote."""
    return msgspec.json.decode(data, type=kind, dec_hook=lambda wanted, text: wanted(text))
