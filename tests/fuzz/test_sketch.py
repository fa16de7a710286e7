"""The number of different inputs is estimated closely, however often each is tried, and over several runs."""

from __future__ import annotations

import pytest
from tests.fuzz.sketch import REGISTERS, about, note, together


@pytest.mark.parametrize("count", [0, 1, 100, 4000, 6000, 100_000])
def test_the_number_of_different_inputs_is_known_to_a_few_percent(count: int) -> None:
    registers = bytearray(REGISTERS)
    for number in [*range(count), *range(count // 2)]:
        note(registers, b"%d" % number)
    assert about(registers) == pytest.approx(count, rel=0.07)


def test_inputs_of_two_runs_count_once() -> None:
    sketches = [bytearray(REGISTERS) for _ in range(3)]
    for number in range(30_000):
        for sketch, begin, end in zip(sketches, (0, 10_000, 0), (20_000, 30_000, 30_000), strict=True):
            if begin <= number < end:
                note(sketch, b"%d" % number)
    assert together(sketches[0], sketches[1]) == sketches[2]
