"""One pass: shards in order, values only until their last reader has run, for any provider of sessions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially

from pipeload.errors import ClosedError, ConfigError
from pipeload.format import manifest as manifests
from pipeload.pipeline.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage


class _Pass:
    """Plain sessions, and notes about each event."""

    def __init__(self, directory: Path) -> None:
        self.manifest = manifests.read(directory)
        self.storage = Storage(directory, self.manifest)
        self.borrowed: list[int] = []
        self.returned: list[int] = []
        self.given: dict[int, dict[str, tuple[int, ...]]] = {}
        self.alive: dict[str, weakref.ref[Value]] = {}
        self.seen: dict[int, set[str]] = {}
        self.stopper = Stopper()
        self.stop_after: int | None = None

    def run(self, inputs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        values = {name: to_value(array) for name, array in inputs.items()}
        one = Feed(pieces=[values], stopper=self.stopper, **options)
        Sweep(self.manifest, self.storage).run([one], self._borrow)
        return {name: to_array(value) for name, value in one.outputs.items()}

    @contextmanager
    def _borrow(self, index: int) -> Iterator[Any]:
        self.borrowed.append(index)
        shard = self.manifest.shards[index]
        parts = [Part(0, shard.nbytes, Buffer(shard.nbytes))]
        self.storage.read_weights(shard, parts, lambda: False)
        outer, session = self, ShardSession(shard, self.storage.graph(shard), parts, 1)

        class Noting:
            def run(self, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value]) -> Any:
                outer.given[index] = {name: tuple(value.shape()) for name, value in inputs.items()}
                outer.seen[index] = {name for name, alive in outer.alive.items() if alive() is not None}
                results = session.run(inputs, stopper, in_place)
                outer.alive |= {n: weakref.ref(v) for n, v in zip(shard.outputs, results, strict=True)}
                return results

        yield Noting()
        self.returned.append(index)
        if index == self.stop_after:
            self.stopper.stop()


def test_every_session_is_borrowed_once_and_in_order(toy: Path) -> None:
    one = _Pass(toy)
    assert_same(one.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=1))
    assert one.borrowed == one.returned == list(range(8))


def test_a_value_lives_until_its_last_use_and_no_longer(toy: Path) -> None:
    one = _Pass(toy)
    one.run(toys.inputs())
    for index in range(1, 8):
        hidden = {name for name in one.seen[index] if name.startswith("hidden")}
        assert hidden == {f"hidden.{index - 1}"}
    assert "mask" in one.seen[6]
    assert "mask" not in one.seen[7]


def test_the_slices_of_a_head_are_put_together(toy_decoder: Path) -> None:
    inputs = toys.inputs() | {f"past.{k}": np.zeros((2, 0, 64), np.float32) for k in range(4)}
    whole, last = _Pass(toy_decoder), _Pass(toy_decoder)
    every = whole.run(inputs)["logits"]
    assert every.shape == (2, 5, 96)
    only = last.run(inputs, positions=1)["logits"]
    assert only.shape == (2, 1, 96)
    np.testing.assert_allclose(only[:, 0], every[:, -1], atol=1e-5)
    # Only the head runs for one position: the other positions' work and memory are saved.
    assert {shape for index in (6, 7) for shape in last.given[index].values()} == {(2, 1, 64)}
    assert last.given[5]["hidden.4"] == (2, 5, 64)


def test_a_used_stopper_ends_the_pass_at_the_next_shard(toy: Path) -> None:
    one = _Pass(toy)
    one.stop_after = 3
    with pytest.raises(ClosedError):
        one.run(toys.inputs())
    assert one.borrowed == one.returned == [0, 1, 2, 3]


def test_an_index_beyond_its_table_is_named_before_any_session_is_borrowed(toy: Path) -> None:
    one = _Pass(toy)
    with pytest.raises(ConfigError, match="'input_ids' is out of range: 96 is no row of"):
        one.run(toys.inputs() | {"input_ids": np.full((2, 5), 96)})
    assert one.borrowed == []
