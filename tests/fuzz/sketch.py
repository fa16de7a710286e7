"""How many different inputs there were, of all runs, in 2 KB: HyperLogLog (Flajolet et al., 2007), to about 2.3 %.

Each of 2,048 groups of hashes has a register: the most zero bits at the front of a hash in that group, plus one. The
sketch of two runs together has the larger of each two registers.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import TypeAlias

__all__ = ["REGISTERS", "Registers", "about", "note", "together"]

Registers: TypeAlias = bytearray | memoryview
"""The sketch: `REGISTERS` bytes, all zero where there was no input."""

REGISTERS = 2048
_GROUP_BITS = REGISTERS.bit_length() - 1
_REST_BITS = 64 - _GROUP_BITS


def note(registers: Registers, data: bytes) -> None:
    """An input was tried."""
    digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
    group, rest = digest % REGISTERS, digest >> _GROUP_BITS
    registers[group] = max(registers[group], _REST_BITS - rest.bit_length() + 1)


def together(one: bytes, other: bytes) -> bytes:
    """The sketch of the inputs of both."""
    return bytes(map(max, one, other))


def about(registers: bytes) -> int:
    """The number of different inputs."""
    empty = registers.count(0)
    found = 0.7213 / (1 + 1.079 / REGISTERS) * REGISTERS**2 / sum(2.0**-value for value in registers)
    if found <= 2.5 * REGISTERS and empty:
        found = REGISTERS * math.log(REGISTERS / empty)
    return round(found)
