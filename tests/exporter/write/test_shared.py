"""Weights that layers share are stored once, whatever the layers call them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import encoder, run

import pipeload
from pipeload_export import verify

LAYERS = 3


def with_equal_layers(*, copies: bool) -> ModelProto:
    """Layers with the weights of the first: copies under names of their own, or the same tensors."""
    model = encoder(LAYERS).model()
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used and tensor.data_type == TensorProto.FLOAT]
    # Words and mask come before the layers, a norm behind them.
    own = weights[3:-2]
    count = len(own) // LAYERS
    assert len(own) == count * LAYERS
    for place, tensor in enumerate(own):
        first = own[place % count]
        assert tuple(first.dims) == tuple(tensor.dims)
        if copies:
            tensor.raw_data = first.raw_data
        else:
            for node in graph.node:
                node.input[:] = [first.name if name == tensor.name else name for name in node.input]
    return model


def answers_agree(sharded: Sharded) -> None:
    """All in memory, with the weights that are stored once read once; and streamed in the smallest budget."""
    inputs = sharded.inputs({"batch": 2, "length": 7})
    wanted = run(sharded.unsplit, inputs)
    assert_same_answers(wanted, sharded.run(inputs))
    stored = {item.weights for item in sharded.model.shards if item.weights}
    with pipeload.load(sharded.directory) as model:
        for _ in range(2):
            assert_same_answers(wanted, model.run(inputs))
        assert not model.plan.streamed_bytes
        assert model.stats.read_bytes == model.manifest.weight_bytes == sum(span.nbytes for span in stored)
        with pytest.raises(pipeload.BudgetError) as refused:
            model.set_budget(1)
        model.set_budget(refused.value.needed_bytes)
        assert_same_answers(wanted, model.run(inputs))


def test_layers_with_equal_weights_have_one_file(shard: Callable[..., Sharded]) -> None:
    for copies in (False, True):
        sharded = shard(with_equal_layers(copies=copies), f"copies-{copies}")
        assert sharded.blocks == LAYERS
        ranges = [item.weights for item in sharded.model.shards if item.role == "block"]
        assert len(set(ranges)) == 1
        paths = [record.path for record in sharded.model.files]
        assert len(paths) == len(set(paths))
        files = {f"shards/{path.name}" for path in (sharded.directory / "shards").iterdir()}
        assert files == set(paths)
        verify(sharded.directory, against=sharded.unsplit)
        answers_agree(sharded)


def test_layers_that_differ_in_one_value_have_files_of_their_own(shard: Callable[..., Sharded]) -> None:
    model = with_equal_layers(copies=True)
    last = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT][-3]
    values = np.frombuffer(last.raw_data, np.float32).copy()
    values[0] += 1
    last.raw_data = values.tobytes()
    sharded = shard(model)
    ranges = [item.weights for item in sharded.model.shards if item.role == "block"]
    assert [ranges.index(item) for item in ranges] == [0, 0, 2]
    assert not Path(sharded.directory / "shards" / "block.001.safetensors").exists()
    answers_agree(sharded)
