"""Kernels with pages of 16 or 64 KiB, as that of the Raspberry Pi 5: memory is counted in the pages that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.harness import run_python
from tests.marks import slow

_PROGRAM = """
import mmap
mmap.PAGESIZE = {page_bytes}
import numpy as np
import pytest
import pipeload
from pipeload.format.pages import memory_ceil
from pipeload.pipeline import loader
from pipeload.storage import buffers
from pipeload.storage.buffers import Buffer
from tests.engine.still_machine import stand_still

# Budgets are counted from a refusal: the process must not grow after it, as it does where the processor is emulated.
stand_still(pytest.MonkeyPatch())
made = []
class Counted(Buffer):
    def __init__(self, nbytes):
        super().__init__(nbytes)
        made.append((memory_ceil(nbytes), self.nbytes))

loader.Buffer = buffers.Buffer = Counted
ids = np.arange(24).reshape(2, 12) % 96
inputs = {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}
with pipeload.load({directory!r}, 1_000_000_000, threads=1) as model:
    expected = model.run(inputs)["last_hidden_state"]
    weights = model.plan.resident_bytes
try:
    pipeload.load({directory!r}, 1, threads=1)
except pipeload.BudgetError as error:
    least = error.needed_bytes
for share in (0.2, 0.3, 0.4, 0.5, 0.6):
    with pipeload.load({directory!r}, int(least + share * weights), threads=1) as model:
        found = [model.run(inputs)["last_hidden_state"] for _ in range(3)]
        # Packed weights, which a later pass may have, round otherwise.
        assert all(np.allclose(one, expected, rtol=0, atol=1e-4) for one in found)
        assert model.plan.streamed_bytes
        assert model.plan.buffer_bytes % {page_bytes} == 0, model.plan
assert made
assert all(reserved == taken and taken % {page_bytes} == 0 for reserved, taken in made)
print("equal")
"""


@pytest.mark.parametrize("page_bytes", [slow(4096), 16384, slow(65536)])
def test_buffers_take_the_memory_that_was_reserved(toy_large: Path, page_bytes: int) -> None:
    assert run_python(_PROGRAM.format(page_bytes=page_bytes, directory=str(toy_large))).stdout == "equal\n"
