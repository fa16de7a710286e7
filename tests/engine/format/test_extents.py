"""What the rules say of an operator's output is what onnxruntime makes; where they cannot know, they say nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.extents import Extent, extent_of, made_by
from pipeload.format.graph_sizes import check_sizes
from pipeload.format.nodes import Graph, graphs_of
from pipeload.format.protobuf import encoded

_F, _I = np.float32, np.int64
_X = np.arange(24, dtype=_F).reshape(2, 3, 4)
_N = np.array([5, -7, 2, 9], _I)
_MANY = np.ones(2000, _I)
"""Too many to be sizes."""


def whole(*values: int) -> NDArray[np.int64]:
    return np.array(values, _I)


_ZERO, _ONE = np.array(0, _I), np.array(1, _I)
_TWO = helper.make_tensor("", TensorProto.INT64, [1], [2])
CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Abs", [_N], {}),
    ("Add", [_X, np.ones((3, 1), _F)], {}),
    ("Add", [_N, whole(2)], {}),
    ("And", [np.array([True, False]), np.array(True)], {}),
    ("Cast", [np.array([1.9, -1.9], _F)], {"to": 7}),
    ("Cast", [_N], {"to": 1}),
    ("Cast", [_N], {"to": 9}),
    ("Cast", [_MANY], {"to": 7}),
    ("Clip", [_X], {}),
    ("Concat", [_N, whole(1), whole(3, 4)], {"axis": 0}),
    ("Concat", [_X, _X], {"axis": -1}),
    ("Concat", [_MANY, _MANY], {"axis": 0}),
    ("Constant", [], {"value": _TWO}),
    ("Constant", [], {"value_int": -3}),
    ("Constant", [], {"value_ints": [4, -5]}),
    ("Constant", [], {"value_float": 0.5}),
    ("Constant", [], {"value_floats": [0.5, 2.0]}),
    ("ConstantOfShape", [whole(2, 3)], {}),
    ("ConstantOfShape", [whole(2, 3)], {"value": _TWO}),
    ("ConstantOfShape", [np.zeros(0, _I)], {"value": _TWO}),
    ("CumSum", [_X, _ONE], {}),
    ("Div", [_N, whole(2)], {}),
    ("Div", [_X, np.array(2, _F)], {}),
    ("Equal", [_N, whole(2)], {}),
    ("Erf", [_X], {}),
    ("Expand", [whole(7), whole(3, 1)], {}),
    ("Expand", [_X, whole(5, 1, 1, 4)], {}),
    ("EyeLike", [_X[0]], {}),
    ("Gather", [_N, whole(-1, 0)], {}),
    ("Gather", [_N, _ONE], {}),
    ("Gather", [_X, whole(1)], {"axis": -2}),
    ("Gather", [_MANY, whole(1)], {}),
    ("Greater", [_N, _ZERO], {}),
    ("HannWindow", [np.array(10, _I)], {}),
    ("Identity", [_N], {}),
    ("LayerNormalization", [_X, np.ones(4, _F)], {}),
    ("MatMul", [_X, np.ones((2, 4, 5), _F)], {}),
    ("Max", [_N, whole(3), whole(4)], {}),
    ("Min", [_N, whole(3)], {}),
    ("Mul", [_N, _N], {}),
    ("Neg", [_N], {}),
    ("Not", [np.array([True])], {}),
    ("OneHot", [whole(1, 0), np.array(3, _I), np.array([0, 1], _F)], {}),
    ("OneHot", [whole(1, 0), np.array(3, _I), np.array([0, 1], _F)], {"axis": 0}),
    ("Pad", [_X, whole(0, 1, 2, 3, 0, 1)], {}),
    ("Pad", [_X, whole(1, 2), np.array(0, _F), whole(-1)], {}),
    ("Pow", [_N, whole(2)], {}),
    ("RandomNormal", [], {"shape": [3, 4]}),
    ("RandomUniformLike", [_X], {}),
    ("Range", [_ZERO, np.array(7, _I), np.array(2, _I)], {}),
    ("Range", [np.array(9, _I), _ONE, np.array(-3, _I)], {}),
    ("Range", [np.array(0, _F), np.array(1, _F), np.array(0.3, _F)], {}),
    ("Range", [_ONE, _ZERO, _ONE], {}),
    ("ReduceMax", [_N], {"keepdims": 0}),
    ("ReduceMean", [_X], {"axes": [-1]}),
    ("ReduceProd", [_N], {"axes": [0]}),
    ("ReduceSum", [_N, whole(0)], {"keepdims": 0}),
    ("ReduceSum", [_X, whole(0, -1)], {}),
    ("Reshape", [_X, whole(0, -1)], {}),
    ("Reshape", [_N, whole(2, 2)], {}),
    ("Reshape", [_X[:, :0], whole(0, 5)], {"allowzero": 1}),
    ("Resize", [_X[None], None, np.array([1, 1, 2, 2.5], _F)], {"mode": "nearest"}),
    ("Resize", [_X[None], None, None, whole(1, 2, 7, 7)], {"mode": "nearest"}),
    ("Resize", [_X[None], None, None, whole(7, 9)], {"mode": "nearest", "axes": [2, 3]}),
    ("Shape", [_X], {}),
    ("Shape", [_X], {"start": -2}),
    ("Shape", [_X], {"start": 0, "end": -1}),
    ("Sigmoid", [_X], {}),
    ("Size", [_X], {}),
    ("Slice", [_N, whole(-1), whole(-(2**40)), whole(0), whole(-1)], {}),
    ("Slice", [_N, whole(1), whole(2**31)], {}),
    ("Slice", [_X, whole(0, 1), whole(1, -1), whole(0, 2)], {}),
    ("Softmax", [_X], {}),
    ("Squeeze", [_X[:1, :, :1]], {}),
    ("Squeeze", [_X[:1], whole(0)], {}),
    ("Sub", [_N, _ONE], {}),
    ("Tile", [_X, whole(1, 2, 3)], {}),
    ("Transpose", [_X], {}),
    ("Transpose", [_X], {"perm": [0, 2, 1]}),
    ("Trilu", [_X], {}),
    ("Unsqueeze", [_N, whole(0, -1)], {}),
    ("Where", [np.array([True, False, True, False]), _N, whole(0)], {}),
    ("Where", [np.array([True]), _MANY, _MANY], {}),
]
UNKNOWN: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("NonZero", [_X], {}),
    ("Reshape", [_X, whole(5, -1)], {}),
    ("Add", [_X, np.ones((7, 1), _F)], {}),
    ("Squeeze", [_X, None], {}),
    ("Tile", [_X, whole(2)], {}),
    ("Constant", [], {"value_string": "a"}),
    ("Expand", [_X, _MANY], {}),
    ("MatMul", [_X, np.ones(4, _F)], {}),
    ("ReduceSum", [_X], {"noop_with_empty_axes": 1}),
]


def _model(kind: str, arrays: list[Any], attributes: dict[str, Any]) -> onnx.ModelProto:
    names = ["" if array is None else f"i{place}" for place, array in enumerate(arrays)]
    inline = [
        numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True) if array is not None
    ]
    node = helper.make_node(kind, names, ["made"], **attributes)
    told = helper.make_empty_tensor_value_info("made")
    opsets = [helper.make_opsetid("", 13 if kind == "ReduceMean" or kind == "ReduceProd" else 18)]
    return helper.make_model(helper.make_graph([node], "g", [], [told], inline), opset_imports=opsets, ir_version=8)


def _ruled(model: onnx.ModelProto) -> Extent | None:
    graph, *_ = graphs_of(memoryview(model.SerializeToString()))
    known = {name: extent_of(tensor) for name, tensor in graph.inline.items()}
    return made_by(graph.nodes[0], [known.get(name) for name in graph.nodes[0].inputs])


@pytest.mark.parametrize(
    ("kind", "arrays", "attributes"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_rule_tells_what_onnxruntime_makes(kind: str, arrays: list[Any], attributes: dict[str, Any]) -> None:
    model = _model(kind, arrays, attributes)
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(None, {})
    found = _ruled(model)
    assert found is not None
    assert found.shape == wanted.shape
    assert found.item_bytes <= wanted.itemsize
    if found.values is not None:
        np.testing.assert_array_equal(found.values, wanted)


@pytest.mark.parametrize(("kind", "arrays", "attributes"), UNKNOWN)
def test_nothing_is_said_where_nothing_is_known(kind: str, arrays: list[Any], attributes: dict[str, Any]) -> None:
    assert _ruled(_model(kind, arrays, attributes)) is None


@pytest.mark.parametrize(
    "kind", ["Add", "Cast", "Concat", "Constant", "Gather", "Mul", "Range", "Shape", "Size", "Where"]
)
def test_the_values_of_small_whole_numbers_are_known(kind: str) -> None:
    """Else no rule would know the size that follows from them."""
    told = [_ruled(_model(*case)) for case in CASES if case[0] == kind]
    assert any(found is not None and found.values is not None for found in told)


def test_the_larger_a_tensor_the_fewer_of_its_bytes_are_read() -> None:
    big = helper.make_tensor("big", TensorProto.INT64, [5000], [1] * 5000)
    graph, *_ = graphs_of(memoryview(helper.make_model(helper.make_graph([], "g", [], [], [big])).SerializeToString()))
    assert graph.inline["big"].shape == (5000,)
    assert graph.inline["big"].values is None


def test_nodes_that_wait_for_each_other_are_no_graph(toy: Path) -> None:
    manifest = manifests.read(toy)
    shard = manifest.shards[2]
    model = onnx.load_from_string((toy / shard.graph.path).read_bytes())
    check_sizes(manifest, shard, model.SerializeToString())
    model.graph.node.extend([helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["a"])])
    with pytest.raises(ShardError, match="is no ONNX graph: its nodes wait for each other"):
        check_sizes(manifest, shard, model.SerializeToString())


def test_reals_in_any_form_are_read_and_damaged_ones_are_not_known() -> None:
    reals = helper.make_tensor("reals", TensorProto.FLOAT, [2], [0.5, 2.0])
    halves = helper.make_tensor("halves", TensorProto.FLOAT16, [2], [0.5, 2.0])
    few = helper.make_tensor("few", TensorProto.FLOAT, [2], [0.5, 2.0])
    few.float_data.pop()
    model = helper.make_model(helper.make_graph([], "g", [], [], [reals, halves, few]))
    graph, *_ = graphs_of(memoryview(model.SerializeToString()))
    found = graph.inline["reals"].values
    assert found is not None
    assert found.tolist() == [0.5, 2.0]
    assert graph.inline["halves"].values is None
    assert graph.inline["few"].values is None


def _terabyte(way: str, graph: onnx.GraphProto) -> list[onnx.FunctionProto]:
    """Let a graph, or a function beside it, make a terabyte."""
    size = helper.make_node("Constant", [], ["size"], name="named", value_ints=[1 << 38])
    made = helper.make_node("ConstantOfShape", ["size"], ["bomb"])
    indices = helper.make_tensor("where", TensorProto.INT64, [1], [5])
    sparse = helper.make_sparse_tensor(helper.make_tensor("few", TensorProto.FLOAT, [1], [1.0]), indices, [1 << 38])
    match way:
        case "a node":
            graph.node.extend([size, made])
        case "a branch":
            inner = helper.make_graph([made], "inner", [], [helper.make_empty_tensor_value_info("bomb")])
            inner.initializer.append(helper.make_tensor("c", TensorProto.BOOL, [], [True]))
            chosen = helper.make_node("If", ["c"], ["out"], then_branch=inner, else_branch=inner)
            graph.node.extend([size, chosen])
        case "a function":
            return [helper.make_function("own", "F", [], ["bomb"], [size, made], [helper.make_opsetid("", 18)])]
        case "a sparse tensor":
            graph.sparse_initializer.append(sparse)
        case _:
            graph.node.append(helper.make_node("Constant", [], ["bomb"], sparse_value=sparse))
    return []


@pytest.mark.parametrize("way", ["a node", "a branch", "a function", "a sparse tensor", "a sparse constant"])
def test_a_terabyte_is_refused_wherever_it_is_made(toy: Path, way: str) -> None:
    manifest = manifests.read(toy)
    shard = manifest.shards[2]
    model = onnx.load_from_string((toy / shard.graph.path).read_bytes())
    model.functions.extend(_terabyte(way, model.graph))
    with pytest.raises(ShardError, match=r"of 1099511627776 bytes where every dimension is 1, .* Do not trust"):
        check_sizes(manifest, shard, model.SerializeToString())


def test_an_input_without_dimensions_has_no_size(toy: Path) -> None:
    """Its rank may be another one than none, so nothing follows from it."""
    manifest = manifests.read(toy)
    shard = manifest.shards[2]
    model = onnx.load_from_string((toy / shard.graph.path).read_bytes())
    hidden = shard.inputs[0]
    model.graph.node.extend(
        [
            helper.make_node("Shape", [hidden], ["s0"], start=1, end=2),
            *(helper.make_node("Mul", [f"s{k}", f"s{k}"], [f"s{k + 1}"]) for k in range(3)),
            helper.make_node("ConstantOfShape", ["s3"], ["bomb"]),
        ]
    )
    data = model.SerializeToString()
    with pytest.raises(ShardError, match="it makes 'bomb'"):
        check_sizes(manifest, shard, data)
    edges = tuple(replace(spec, shape=()) for spec in manifest.edges)
    check_sizes(replace(manifest, edges=edges), shard, data)


def test_a_field_without_a_meaning_is_passed() -> None:
    """In a graph, a number; onnxruntime passes it, too."""
    [graph] = graphs_of(memoryview(encoded(7, encoded(2, b"g") + encoded(20, 5))))
    assert graph == Graph()
