"""The counts of several runs add up, and no input counts twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz.counted import add, counted
from tests.fuzz.mutations import bytes_of
from tests.fuzz.run import Broken, Tally, inputs_of
from tests.fuzz.target import Target


def test_runs_add_up_and_targets_that_were_not_tried_keep_their_counts(tmp_path: Path) -> None:
    path = tmp_path / "counted.json"
    sizes = Tally(inputs=5, refused=3, answered=2, slowest_s=0.5, peak_bytes=7)
    add({"sizes": sizes, "gguf": Tally(inputs=1)}, 1, path)
    broken = [Broken(data=b"x", reason="wrong")]
    add({"sizes": Tally(inputs=10, refused=4, answered=5, slowest_s=0.1, peak_bytes=9, broken=broken)}, 2, path)
    found = counted(path)["sizes"]
    assert (found.inputs, found.refused, found.answered, found.broken) == (15, 7, 7, 1)
    assert (found.slowest_s, found.peak_bytes, found.seeds) == (0.5, 9, (1, 2))
    assert counted(path)["gguf"].inputs == 1


def test_memory_that_grew_is_a_failure_without_an_input(tmp_path: Path) -> None:
    tally = Tally(inputs=3, refused=3, broken=[Broken(data=None, reason="memory grew")])
    assert add({"sizes": tally}, 1, tmp_path / "counted.json")["sizes"].broken == 1


def test_the_inputs_of_a_seed_count_once(tmp_path: Path) -> None:
    path = tmp_path / "counted.json"
    add({"sizes": Tally(inputs=5, refused=5)}, 1, path)
    with pytest.raises(ValueError, match="seed 1 are counted"):
        add({"sizes": Tally(inputs=9, refused=9)}, 1, path)
    assert counted(path)["sizes"].inputs == 5


def test_a_later_run_begins_behind_the_known_inputs() -> None:
    target = Target(name="planted", what="", prepare=lambda: bool, mutate=bytes_of)
    pool = [b"known", b"as well"]
    first, later = inputs_of(target, pool, 1), inputs_of(target, pool, 1, first=len(pool))
    assert [first(0), first(1)] == pool
    assert [later(number) for number in range(50)] == [first(number) for number in range(2, 52)]
