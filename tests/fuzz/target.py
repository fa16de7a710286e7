"""A reader of strangers' bytes, and how it is tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

__all__ = ["Mutate", "Target", "Trial", "Wrong"]

Trial: TypeAlias = Callable[[bytes], bool]
"""Reads an input: True where it got an answer, which was right; False where it was refused with a PipeloadError."""

Mutate: TypeAlias = Callable[[Random, Sequence[bytes]], bytes]
"""Makes an input from those that are known."""


class Wrong(Exception):  # noqa: N818
    """An input got an answer, and it is not the right one.

    Args:
        rule: that was broken, the same words for all inputs.
        detail: of this input.
    """

    def __init__(self, rule: str, detail: object = "") -> None:
        super().__init__(rule, detail)
        self.rule, self.detail = rule, str(detail)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader.

    Attributes:
        name: on the command line, and of its folders.
        what: that is read, for the table.
        prepare: makes the trial, in the process that runs it.
        mutate: makes inputs.
        seeds: inputs beside those of the corpus.
        native: what reads is C, C++ or Rust, which may end the process, or a program that comes with the model: the
            goal is 10^5 inputs for it, and 10^7 for all others together.
        share: of the time of a run over all targets.
        limit_s: the most seconds of a processor that an input may take.
        memory_bytes: the most memory that the process may take beside what it has when it begins.
    """

    name: str
    what: str
    prepare: Callable[[], Trial]
    mutate: Mutate
    seeds: Callable[[], list[bytes]] = list
    native: bool = False
    share: float = 1.0
    limit_s: float = 5.0
    memory_bytes: int = 256 << 20
