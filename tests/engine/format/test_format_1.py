"""Directories of format 1 that an earlier version exported still load and answer as they did.

`tests/data/format-1` holds a tiny BERT and a tiny GPT-2 with caches, a lifted table and a head in slices, as the commit
9123a3b exported them; `reference.npz` has the unsplit graphs' answers, `greedy.npy` transformers' continuations.
They are never exported anew: a change that needs that is another format.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import assert_close, smallest_budget

import pipeload
from pipeload.format import manifest as manifests

_FOLDER = Path(__file__).parents[2] / "data" / "format-1"


@pytest.mark.parametrize("room_bytes", [2_000_000, 100_000_000], ids=["streamed", "resident"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_directories_that_were_exported_before_answer_as_they_did(name: str, room_bytes: int) -> None:
    directory = _FOLDER / name
    with (
        np.load(directory / "reference.npz") as saved,
        pipeload.load(directory, smallest_budget(directory) + room_bytes) as model,
    ):
        for number in sorted({key.split(".")[1] for key in saved.files}):
            inputs, outputs = (
                {key.split(".", 2)[2]: saved[key] for key in saved.files if key.startswith(f"{kind}.{number}.")}
                for kind in ("input", "output")
            )
            assert_close(model.run(inputs), outputs, 1e-4)


def test_a_decoder_that_was_exported_before_goes_on_as_it_did() -> None:
    directory = _FOLDER / "gpt2"
    with pipeload.load(directory, smallest_budget(directory) + 10_000_000) as model:
        assert (
            list(model.generate([5, 6, 7, 8], max_new_tokens=8).token_ids) == np.load(directory / "greedy.npy").tolist()
        )


def test_the_manifests_that_were_exported_before_have_every_part_of_the_format() -> None:
    bert, gpt2 = (manifests.read(_FOLDER / name) for name in ("bert", "gpt2"))
    assert any(shard.lookups for shard in bert.shards)
    assert any(shard.lookups for shard in gpt2.shards)
    assert gpt2.head is not None
    assert len(gpt2.head.shards) > 1
    assert all(cache.in_place for cache in gpt2.caches)
