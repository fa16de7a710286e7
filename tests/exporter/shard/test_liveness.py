"""Tensors are alive from the node that makes them to the last that needs them."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from pipeload_export.shard.liveness import live_bytes, live_tensors
from pipeload_export.shard.trial import Event


def test_tensors_are_freed_after_their_last_use_and_views_take_nothing() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["view"]),
        helper.make_node("Relu", ["view"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    value = helper.make_empty_tensor_value_info("y")
    model = helper.make_model(helper.make_graph(nodes, "g", [], [value]))
    events = [Event(node=i, outputs=((4, 25),)) for i in range(4)]
    assert live_bytes(live_tensors(model, events, {})) == [100, 100, 200, 200]


def test_outputs_stay_to_the_end() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["z"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
    events = [Event(node=i, outputs=((4, 2),)) for i in range(2)]
    assert live_bytes(live_tensors(model, events, {})) == [8, 16]


def test_a_cache_that_is_written_in_place_takes_nothing() -> None:
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "at"], ["present"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("present", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
    events = [Event(node=i, outputs=((4, 2),)) for i in range(2)]
    tensors = live_tensors(model, events, {})
    assert [tensor.first for tensor in tensors] == [1]
    assert live_bytes(tensors) == [0, 8]


def test_a_cast_of_the_session_lives_until_the_node_that_wanted_it() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info("y")]))
    events = [Event(node=2, outputs=((4, 10),)), *(Event(node=i, outputs=((2, 10),)) for i in range(2))]
    assert live_bytes(live_tensors(model, events, {})) == [40, 60, 40]


def test_what_a_kernel_takes_for_itself_is_alive_only_while_it_works() -> None:
    nodes = [helper.make_node("Where", ["c", "x", "z"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info("y")]))
    events = [Event(node=i, outputs=((4, 5),)) for i in range(2)]
    assert live_bytes(live_tensors(model, events, {})) == [20 + 8 * 5, 40]


@pytest.mark.parametrize(
    ("bits", "level", "zeros", "decompressed"),
    [
        (4, 4, None, False),
        (4, 0, None, False),
        (8, 4, None, False),
        (8, 0, None, True),
        (4, 4, (16, 2), False),
        (8, 4, (16, 4), False),
        # Floats: one for each block.
        (4, 4, (16, 4), True),
    ],
)
def test_a_weight_of_few_bits_is_decompressed_where_no_packed_kernel_fits(
    bits: int, level: int, zeros: tuple[int, ...] | None, decompressed: bool
) -> None:
    names = ["x", "blobs", "scales", *(["zeros"] if zeros else [])]
    options = {"K": 128, "N": 16, "bits": bits, "block_size": 32, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **options)
    value = helper.make_tensor_value_info
    weights = [TensorProto(name="zeros", data_type=1, dims=zeros)] if zeros else []
    graph = helper.make_graph([node], "g", [value("x", 1, ["m", 128])], [value("y", 1, ["m", 16])], weights)
    events = [Event(node=0, outputs=((4, 3, 16),))]
    (peak,) = live_bytes(live_tensors(helper.make_model(graph), events, {"x": (3, 128)}))
    assert peak == 4 * 3 * 16 + 4 * 3 * 128 + (4 * 128 * 16 if decompressed else 0)
