"""How many inputs each target has read in all runs with --keep: in counted.json, and the table of docs/reliability.md.

Counts of several runs add up. The known inputs of a target count in its first run, and those of a seed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from tests.fuzz.run import Tally
from tests.fuzz.sketch import REGISTERS, about, together
from tests.fuzz.target import Target
from tests.proof.counts import Line, keep

__all__ = ["FILE", "Counted", "add", "counted", "publish"]

FILE = Path(__file__).with_name("counted.json")


class Counted(msgspec.Struct, kw_only=True, frozen=True):
    """What a target has read.

    Attributes:
        inputs: of these, `refused` and `answered` as they should be, and `broken` broke a promise.
        seconds: of all runs.
        slowest_s: the most processor time of an input.
        peak_bytes: the most memory of the process.
        seeds: of the runs; those of the runs before this file was made are not known.
        registers: of the different inputs, see `sketch`; those of runs before there was one are not among them.
    """

    inputs: int = 0
    refused: int = 0
    answered: int = 0
    broken: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    seeds: tuple[int, ...] = ()
    registers: bytes = bytes(REGISTERS)

    def with_run(self, tally: Tally, seed: int) -> Counted:
        """These and a run's; a seed that is among them is a ValueError."""
        if seed in self.seeds:
            raise ValueError(f"The inputs of seed {seed} are counted: choose another --seed.")
        return Counted(
            inputs=self.inputs + tally.inputs,
            refused=self.refused + tally.refused,
            answered=self.answered + tally.answered,
            # A child whose memory grew has no input that did it.
            broken=self.broken + max(tally.inputs - tally.refused - tally.answered, len(tally.broken)),
            seconds=round(self.seconds + tally.seconds, 1),
            slowest_s=round(max(self.slowest_s, tally.slowest_s), 3),
            peak_bytes=max(self.peak_bytes, tally.peak_bytes),
            seeds=(*self.seeds, seed),
            registers=together(self.registers, tally.registers),
        )


def counted(path: Path = FILE) -> dict[str, Counted]:
    """Target -> what it has read."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Counted]) if path.is_file() else {}


def add(tallies: Mapping[str, Tally], seed: int, path: Path = FILE) -> dict[str, Counted]:
    """Add a run's counts to those of its targets, write all, and return them."""
    before = counted(path)
    after = before | {name: before.get(name, Counted()).with_run(tally, seed) for name, tally in tallies.items()}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(after, order="sorted"), indent=1) + b"\n")
    return after


def publish(targets: list[Target], found: Mapping[str, Counted]) -> None:
    """Write the table: a row for each target that has read something, and one for each of the two goals."""
    tried = [target for target in targets if target.name in found]
    lines = [_line(target.what, [found[target.name]]) for target in tried]
    for what, native in (
        ("**all readers in Python together**", False),
        ("**all that run C, C++, Rust or a program of the model, together**", True),
    ):
        lines.append(_line(what, [found[target.name] for target in tried if target.native is native]))
    seconds = sum(one.seconds for one in found.values())
    keep("fuzz", "python -m tests.fuzz [TARGET ...] --seconds S --keep", seconds, lines)


def _line(what: str, parts: list[Counted]) -> Line:
    slowest_s = max((one.slowest_s for one in parts), default=0.0)
    peak_bytes = max((one.peak_bytes for one in parts), default=0)
    return Line(
        fault=what,
        outcome=f"{sum(one.refused for one in parts):,} refused, {sum(one.answered for one in parts):,} answered; "
        f"{sum(about(one.registers) for one in parts):,} or more are different",
        recovered=f"slowest {slowest_s:.2f} s, peak {peak_bytes / 1e6:.0f} MB",
        runs=sum(one.inputs for one in parts),
        failures=sum(one.broken for one in parts),
    )
