"""Shards share a structure where they have the same graph, and take inputs of the same shapes."""

from __future__ import annotations

from collections.abc import Callable

from tests.exporter.conftest import Sharded
from tests.exporter.graphs import WIDTH, Builder


def test_layers_behind_a_change_of_the_length_have_a_bound_of_their_own(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for number in range(6):
        if number == 4:
            x = builder.op("Concat", x, x, axis=1)
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", None, WIDTH])
    model = shard(builder.model()).model
    blocks = {item.structure for item in model.shards if item.role == "block"}
    assert len(blocks) == 1
    before, behind = model.structures[blocks.pop()], model.structures[model.shards[-1].structure]
    assert before.activation_bytes({"batch": 2, "length": 60}) == behind.activation_bytes({"batch": 2, "length": 30})
