"""Outputs count as long as callers keep them, whatever thread drops them, and whenever."""

from __future__ import annotations

import threading

import numpy as np
from tests.engine.harness import PATIENCE_S, Background

from pipeload.pipeline.lent_outputs import LentOutputs
from pipeload.pipeline.session import Value, to_value


def test_outputs_count_until_they_are_dropped() -> None:
    lent = LentOutputs()
    kept = [to_value(np.zeros(size, np.uint8)) for size in (100, 20, 3)]
    lent.add(kept)
    assert lent.nbytes == 123
    del kept[0]
    assert lent.nbytes == 23
    kept.clear()
    assert lent.nbytes == 0


def test_callers_drop_outputs_while_they_are_summed_up() -> None:
    lent = LentOutputs()
    values: list[Value] = [to_value(np.zeros(1, np.uint8)) for _ in range(20_000)]
    lent.add(values)
    begun = threading.Event()

    def drop() -> None:
        while values:
            values.pop()
            begun.set()

    dropping = Background(drop)
    assert begun.wait(PATIENCE_S)
    while dropping.is_alive():
        assert 0 <= lent.nbytes <= 20_000
    dropping.end()
    assert lent.nbytes == 0
