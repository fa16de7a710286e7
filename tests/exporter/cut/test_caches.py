"""Caches are what grows along a length with the calls, and every model that was split can be opened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import NodeProto, TensorProto, helper
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import WIDTH, Builder, encoder, grouped_decoder, run

import pipeload

PLACE = {"batch": 2, "length": 3, "past": 4, "total": 7}


def pairs(sharded: Sharded) -> list[tuple[str, str]]:
    return [(cache.input, cache.output) for cache in sharded.model.caches]


def opens_and_answers(sharded: Sharded, dims: dict[str, int]) -> None:
    inputs = sharded.inputs(dims)
    with pipeload.load(sharded.directory) as model:
        assert_same_answers(run(sharded.unsplit, inputs), model.run(inputs))


def decoder(builder: Builder, *, past: list[str | int]) -> str:
    """Three layers with a cache each."""
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    bias = builder.mask_bias(builder.input("attention_mask", ["batch", "total"]))
    for number in range(3):
        before = builder.input(f"past.{number}.key", past, TensorProto.FLOAT)
        update, present = builder.attention(x, bias=bias, past=before)
        x = builder.op("Add", x, update)
        x = builder.op("Add", x, builder.feed_forward(x))
        builder.output(present, f"present.{number}.key", ["batch", "total", WIDTH])
    return x


@pytest.mark.parametrize("whole", [False, True])
def test_inputs_that_come_out_again_are_no_caches(whole: bool, shard: Callable[..., Sharded]) -> None:
    builder = encoder()
    for name in ("input_ids", "attention_mask"):
        builder.output(name, f"{name}_again", ["batch", "length"], TensorProto.INT64)
    sharded = shard(builder.model(), whole=whole)
    assert not pairs(sharded)
    opens_and_answers(sharded, PLACE)


def test_an_output_of_the_rank_of_an_input_is_no_cache(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    sound = builder.input("input_features", ["batch", WIDTH, 40], TensorProto.FLOAT)
    x = builder.op("Transpose", builder.op("MaxPool", sound, kernel_shape=[2], strides=[2]), perm=[0, 2, 1])
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "encoder_last_hidden_state", ["batch", 20, WIDTH])
    for whole in (False, True):
        sharded = shard(builder.model(), f"whole-{whole}", whole=whole)
        assert not pairs(sharded)
        opens_and_answers(sharded, PLACE)


def test_a_result_that_is_longer_than_an_input_is_no_cache(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    prefix = builder.input("prefix", ["batch", "past", WIDTH], TensorProto.FLOAT)
    x = builder.op("Concat", prefix, builder.embed(builder.input("input_ids", ["batch", "length"])), axis=1)
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", "past + length", WIDTH])
    sharded = shard(builder.model(), whole=True)
    assert not pairs(sharded)
    opens_and_answers(sharded, PLACE)


def test_a_state_of_constant_size_comes_back_beside_caches_that_grow(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    states = [
        builder.input(name, ["batch", 4, WIDTH], TensorProto.FLOAT) for name in ("past.conv", "encoder_states", "image")
    ]
    x = decoder(builder, past=["batch", "past", WIDTH])
    for state, name in zip(states, ("present.conv", "encoder_last_hidden_state", "image_features"), strict=True):
        builder.output(builder.op("Tanh", state), name, ["batch", 4, WIDTH])
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model(), whole=True)
    grown = [(f"past.{number}.key", f"present.{number}.key") for number in range(3)]
    assert pairs(sharded) == [("past.conv", "present.conv"), *grown]
    opens_and_answers(sharded, PLACE)


def test_states_of_constant_size_alone_are_no_caches(shard: Callable[..., Sharded]) -> None:
    builder = encoder()
    state = builder.input("past.conv", ["batch", 4, WIDTH], TensorProto.FLOAT)
    builder.output(builder.op("Tanh", state), "present.conv", ["batch", 4, WIDTH])
    sharded = shard(builder.model())
    assert not pairs(sharded)
    opens_and_answers(sharded, PLACE)


@pytest.mark.parametrize("declared", [None, "total", "past + length"])
def test_caches_grow_by_a_length_of_the_inputs(declared: str | None, shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = decoder(builder, past=["batch", "past", WIDTH])
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    model = builder.model()
    for value in model.graph.output[:-1]:
        dim = value.type.tensor_type.shape.dim[1]
        dim.Clear()
        if declared:
            dim.dim_param = declared
    sharded = shard(model)
    assert pairs(sharded) == [(f"past.{number}.key", f"present.{number}.key") for number in range(3)]
    opens_and_answers(sharded, PLACE)


def test_caches_that_are_appended_to_as_int8_are_caches(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    builder.output(builder.norm(decoder(builder, past=["batch", "past", WIDTH])), "hidden", ["batch", "length", WIDTH])
    step = [builder.constant(0.05, "float32"), builder.constant(0, "uint8")]

    def rounded(node: NodeProto) -> list[NodeProto]:
        small = [f"{name}.rounded" for name in (*node.input, *node.output)]
        nodes = [
            helper.make_node("QuantizeLinear", [name, *step], [one])
            for name, one in zip(node.input, small, strict=False)
        ]
        parts = [name for one in small[:-1] for name in (one, *step)]
        append = helper.make_node("QLinearConcat", [*step, *parts], small[-1:], domain="com.microsoft", axis=1)
        return [*nodes, append, helper.make_node("DequantizeLinear", [small[-1], *step], node.output)]

    builder.nodes = [one for node in builder.nodes for one in (rounded(node) if node.op_type == "Concat" else [node])]
    assert pairs(shard(builder.model())) == [(f"past.{number}.key", f"present.{number}.key") for number in range(3)]


def test_keys_and_values_of_one_operator_are_told_apart_by_its_places(shard: Callable[..., Sharded]) -> None:
    model = grouped_decoder().model()
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs[::-1])
    sharded = shard(model)
    names = [f"{number}.{kind}" for number in range(3) for kind in ("key", "value")]
    assert pairs(sharded) == [(f"past.{name}", f"present.{name}") for name in names]


@pytest.mark.parametrize("asked_first", [False, True])
def test_a_block_asks_for_the_length_of_its_own_cache(asked_first: bool, shard: Callable[..., Sharded]) -> None:
    """Wherever the graph asks for it: no shard but the block takes the cache."""
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for number in range(3):
        past = builder.input(f"past.{number}.key", ["batch", "past", WIDTH], TensorProto.FLOAT)
        length = builder.op("Shape", past, start=1, end=2) if asked_first else None
        update, present = builder.attention(x, past=past)
        length = length or builder.op("Shape", past, start=1, end=2)
        x = builder.op("Add", x, builder.op("Mul", update, builder.op("Cast", length, to=TensorProto.FLOAT)))
        x = builder.op("Add", x, builder.feed_forward(x))
        builder.output(present, f"present.{number}.key", ["batch", "past + length", WIDTH])
    builder.output(x, "y", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    assert len(pairs(sharded)) == 3
    for cache in sharded.model.caches:
        assert [item.role for item in sharded.model.shards if cache.input in item.inputs] == ["block"]
    opens_and_answers(sharded, PLACE)
