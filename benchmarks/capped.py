"""A model under a memory cap, beside others that do the same work without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from benchmarks.models import exported
from pipeload.bench.spec import ContenderName, Spec, Task

__all__ = ["CappedCase"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedCase:
    """A model, a cap, and the work.

    Attributes:
        name: its recipe in models/catalog.toml.
        cap_bytes: the cgroup's limit.
        passes: later passes, or tokens to generate.
        task, texts, prompt, sizes: see `Spec`.
    """

    name: str
    cap_bytes: int
    passes: int
    task: Task = "pass"
    texts: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def work(self, contender: ContenderName, console: Console) -> Spec:
        """The work of one contender, on two threads; the model is exported first if it is missing."""
        directory, unsplit = exported(self.name, console)
        return Spec(
            contender=contender,
            directory=directory,
            unsplit=unsplit,
            task=self.task,
            texts=self.texts,
            prompt=self.prompt,
            sizes=self.sizes,
            passes=self.passes,
            threads=2,
        )
