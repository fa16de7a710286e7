"""Nothing grows: threads, descriptors and memory stay as they were over many passes and many models."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    EMULATED,
    smallest_budget,
)
from tests.engine.model.loading import (
    load,
)

from pipeload.machine.memory import rss_bytes


@pytest.mark.slow
def test_a_thousand_passes_leave_threads_descriptors_and_memory_as_they_were(
    toy: Path, descriptors: Callable[[], int]
) -> None:
    # Until then the trace grows.
    passes, warm = (100, 40) if EMULATED else (1000, 400)
    with load(toy, smallest_budget(toy), threads=1) as model:
        assert model.plan.streamed_bytes > 0
        for number in range(passes):
            model.run(toys.inputs(1, 1 + number % 7))
            if number == warm:
                before = (threading.active_count(), rss_bytes(), descriptors())
        assert threading.active_count() == before[0]
        # The emulator's own memory grows as it translates more code.
        assert EMULATED or rss_bytes() - before[1] < 4_000_000
        # Each loader may have a file open at one of the two moments.
        assert abs(descriptors() - before[2]) <= 2 * model.plan.loaders
    assert model.stats.passes == passes


def test_passes_intern_no_text_that_nobody_keeps(toy: Path) -> None:
    """Python's table of interned texts, half a megabyte, is copied and grows where many come and go."""
    passes = 3
    interned: Counter[str] = Counter()
    intern = sys.intern

    def noting(text: str) -> str:
        interned["".join(list(text))] += 1  # a copy, which keeps nothing alive
        return intern(text)

    with load(toy, smallest_budget(toy)) as model:
        model.run(toys.inputs())
        with mock.patch("sys.intern", noting):
            for _ in range(passes):
                model.run(toys.inputs())
        assert "block.000.onnx" in interned, "paths intern their parts no more, and this test finds nothing"
        of_each_pass = [text for text, count in interned.items() if count >= passes and len(text) > 1]
        # A text that is interned already gives the one that is kept.
        assert [copy for copy in of_each_pass if intern(copy) is copy] == []


@pytest.mark.slow
def test_opening_and_closing_leaves_nothing(toy: Path, descriptors: Callable[[], int]) -> None:
    def cycle() -> None:
        with load(toy, smallest_budget(toy)) as model:
            model.run(toys.inputs())

    for _ in range(10):
        cycle()
    before = (threading.active_count(), descriptors(), rss_bytes())
    for _ in range(10 if EMULATED else 40):
        cycle()
    assert (threading.active_count(), descriptors()) == before[:2]
    # The emulator's own memory grows as it translates more code.
    assert EMULATED or rss_bytes() - before[2] < 4_000_000
