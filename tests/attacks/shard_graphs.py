"""Graphs of shards that take more than the manifest lists: tensors from files, in every place where ONNX has tensors.

The attacker gives away a model directory, of which he writes the manifest too. He wants onnxruntime to open files of
the user, or to load weights that no plan counts and no hash covers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper
from tests.attacks.attack import HELD, attack, refused, run_module
from tests.attacks.victims import GRAPH, change_manifest, model_directory, read_all, run_model

from pipeload.errors import LoadError, ShardError

_LOCATIONS = ("/etc/passwd", "../secret.txt", "block.001.safetensors", "link", "*/_ORT_MEM_ADDR_/*")


def external(location: str, name: str = "evil", **more: str) -> TensorProto:
    """A tensor of ten floats that lies in a file."""
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[10], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location, "offset": "0", "length": "40"} | more).items():
        made.external_data.add(key=key, value=value)
    return made


def planted(model: ModelProto, tensor: TensorProto) -> Iterator[ModelProto]:
    """Copies of the model, each with the tensor in another place."""

    def copy(change: Callable[[ModelProto], object]) -> ModelProto:
        made = ModelProto()
        made.CopyFrom(model)
        change(made)
        return made

    sparse = SparseTensorProto(values=tensor, indices=helper.make_tensor("i", TensorProto.INT64, [10], [*range(10)]))
    sparse.dims.append(10)
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("o", 1, [10])], [tensor])
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    deep = helper.make_graph([helper.make_node("If", ["b"], ["o"], then_branch=inner, else_branch=inner)], "d", [], [])
    attributes = (
        {"value": tensor},
        {"value": [tensor]},
        {"sparse_value": sparse},
        {"sparse_value": [sparse]},
        {"body": inner},
        {"body": [inner]},
        {"body": deep},
        {"body": helper.make_graph([node], "n", [], [])},
    )
    yield copy(lambda made: made.graph.initializer.append(tensor))
    yield copy(lambda made: made.graph.sparse_initializer.append(sparse))
    for given in attributes:
        yield copy(lambda made, given=given: made.graph.node.append(helper.make_node("Odd", [], ["c"], **given)))
    function = helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 17)])
    yield copy(lambda made: made.functions.append(function))
    standing = helper.make_function("own", "F", [], ["c"], [], [helper.make_opsetid("", 17)])
    standing.attribute_proto.append(helper.make_attribute("a", tensor))
    yield copy(lambda made: made.functions.append(standing))
    for step in ("initialization", "algorithm"):
        yield copy(lambda made, step=step: getattr(made.training_info.add(), step).CopyFrom(inner))


@attack
def tensors_from_files_in_every_place(folder: Path) -> str:
    """A tensor from a file as initialiser, sparse one, attribute, in subgraphs, functions and training information."""
    directory = model_directory(folder)
    (directory / "shards" / "link").symlink_to(folder / "secret.txt")
    model = onnx.load(directory / GRAPH, load_external_data=False)
    outcome = HELD
    for location in _LOCATIONS:
        for made in planted(model, external(location)):
            outcome = refused(lambda made=made: read_all(_with_graph(directory, made)), ShardError, "from ")
    return outcome


@attack
def places_that_others_read_differently(folder: Path) -> str:
    """A listed tensor with parts of a place that onnxruntime knows, given twice, or names that are no UTF-8."""
    directory = model_directory(folder)
    model = onnx.load(directory / GRAPH, load_external_data=False)
    outcome = HELD
    for key, value in (("location", "block.001.safetensors"), ("prepacked_0", "a|0|4|0"), ("checksum", "0")):
        made = ModelProto()
        made.CopyFrom(model)
        made.graph.initializer[0].external_data.add(key=key, value=value)
        outcome = refused(lambda made=made: read_all(_with_graph(directory, made)), ShardError, "has the part")
    name = model.graph.initializer[0].name.encode()
    data = model.SerializeToString().replace(name, b"\xff" * len(name))
    refused(lambda: read_all(_with_graph(directory, data)), ShardError, "is no ONNX graph")
    return outcome


@attack
def graphs_that_lead_a_parser_astray(folder: Path) -> str:
    """A graph nested a thousand deep, fields that end outside of the file, numbers without an end."""
    directory = model_directory(folder)
    deep = b""
    for _ in range(1000):
        # attribute 6 (a graph) of node 5 of a graph with node 1
        attribute = b"\x32" + _length(deep) + deep
        node = b"\x2a" + _length(attribute) + attribute
        deep = b"\x0a" + _length(node) + node
    outcome = HELD
    for data in (b"\x3a" + _length(deep) + deep, b"\x3a\xff\xff\xff\xff\x0f", b"\x80" * 1000, b"\x3a\x80", b"\x3f"):
        outcome = refused(lambda data=data: read_all(_with_graph(directory, data)), ShardError, "is no ONNX graph")
    return outcome


@attack
def operators_of_a_stranger(folder: Path) -> str:
    """A node of a custom domain, and a function that calls itself: onnxruntime has no library that could run them."""
    outcome = HELD
    for number, change in enumerate((_custom, _recursive)):
        (own := folder / str(number)).mkdir()
        directory = model_directory(own)
        model = onnx.load(directory / GRAPH, load_external_data=False)
        change(model)
        outcome = refused(lambda d=directory, m=model: run_model(_with_graph(d, m)), LoadError, "refused")
    return outcome


def _custom(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node[0].domain = "evil"


def _recursive(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("own", 1))
    body = [helper.make_node("F", ["x"], ["y"], domain="own")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], body, opsets))
    made = model.graph.output[0].name
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == made:
                node.output[place] = "before"
    model.graph.node.append(helper.make_node("F", ["before"], [made], domain="own"))


@attack
def sizes_beyond_the_manifest(folder: Path) -> str:
    """Operators that make a terabyte of nothing: of constants, of shapes, in steps, in a branch, and out of order."""
    outcome = HELD
    for number, (inline, nodes) in enumerate(_bombs()):
        (own := folder / str(number)).mkdir()
        directory = model_directory(own)
        model = onnx.load(directory / GRAPH, load_external_data=False)
        model.graph.initializer.extend(inline)
        model.graph.node.extend(nodes)
        outcome = refused(lambda d=directory, m=model: read_all(_with_graph(d, m)), ShardError, "Do not trust this")
    (sparse := folder / "sparse").mkdir()
    directory = model_directory(sparse)
    model = onnx.load(directory / GRAPH, load_external_data=False)
    values = helper.make_tensor("few", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("where", TensorProto.INT64, [1], [5])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 38]))
    refused(lambda: read_all(_with_graph(directory, model)), ShardError, "Do not trust this")
    return outcome


def _bombs() -> Iterator[tuple[list[TensorProto], list[NodeProto]]]:
    """Initialisers and nodes of graphs whose last tensor has a terabyte; each is for a shard that takes `hidden.1`."""
    huge, many, node = 1 << 38, 1 << 20, helper.make_node

    def whole(*values: int, name: str = "size") -> TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    def number(kind: int, value: float, name: str) -> TensorProto:
        return helper.make_tensor(name, kind, [], [value])

    one = node("Constant", [], ["one"], value=helper.make_tensor("", TensorProto.FLOAT, [1], [1.0]))
    made = node("ConstantOfShape", ["size"], ["bomb"])
    yield [whole(huge)], [made]
    yield [whole(huge)], [one, node("Expand", ["one", "size"], ["bomb"])]
    yield [whole(huge)], [one, node("Tile", ["one", "size"], ["bomb"])]
    yield [whole(0, huge)], [one, node("Pad", ["one", "size"], ["bomb"])]
    whole_range = [number(TensorProto.INT64, value, name) for name, value in (("a", 0), ("b", huge), ("c", 1))]
    yield whole_range, [node("Range", ["a", "b", "c"], ["bomb"])]
    real_range = [number(TensorProto.FLOAT, value, name) for name, value in (("a", 0), ("b", huge), ("c", 0.5))]
    yield real_range, [node("Range", ["a", "b", "c"], ["bomb"])]
    depth = [whole(0), number(TensorProto.INT64, huge, "depth"), whole(0, 1, name="values")]
    yield depth, [node("OneHot", ["size", "depth", "values"], ["bomb"])]
    sizes = [whole(1, 1, many, many, name="sizes"), whole(1, 1, 1, 1)]
    resized = node("Resize", ["image", "", "", "sizes"], ["bomb"], mode="nearest")
    yield sizes, [one, node("Reshape", ["one", "size"], ["image"]), resized]
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, float(many), float(many)])
    resized = node("Resize", ["image", "", "scales"], ["bomb"], mode="nearest")
    yield [scales, whole(1, 1, 1, 1)], [one, node("Reshape", ["one", "size"], ["image"]), resized]
    yield [], [node("RandomNormal", [], ["bomb"], shape=[many, many])]
    # By arithmetic on shapes.
    shape = node("Shape", ["hidden.1"], ["shape"])
    yield [whole(many)], [shape, node("Mul", ["shape", "size"], ["by"]), node("ConstantOfShape", ["by"], ["bomb"])]
    squares = [node("Mul", [f"s{k}", f"s{k}"], [f"s{k + 1}"]) for k in range(3)]
    yield [], [node("Shape", ["hidden.1"], ["s0"], start=1, end=2), *squares, node("ConstantOfShape", ["s3"], ["bomb"])]
    # By operators that make a little more of what they get, again and again.
    doubled = [node("Concat", [f"x{k}", f"x{k}"], [f"x{k + 1}"], axis=0) for k in range(40)]
    yield [], [node("Identity", ["hidden.1"], ["x0"]), *doubled]
    column, row, pair = whole(-1, 1, name="column"), whole(1, -1, name="row"), []
    for k in range(4):
        pair += [node("Reshape", [f"x{k}", "column"], [f"c{k}"]), node("Reshape", [f"x{k}", "row"], [f"r{k}"])]
        pair.append(node("MatMul" if k % 2 else "Add", [f"c{k}", f"r{k}"], [f"x{k + 1}"]))
    yield [column, row], [node("Identity", ["hidden.1"], ["x0"]), *pair]
    # In a branch that sees the size around it, and before the node that makes its size.
    told = helper.make_tensor_value_info("bomb", TensorProto.FLOAT, ["n"])
    inner = helper.make_graph([made], "inner", [], [told])
    truth = number(TensorProto.BOOL, 1, "truth")
    yield [whole(huge), truth], [node("If", ["truth"], ["out"], then_branch=inner, else_branch=inner)]
    yield [], [node("ConstantOfShape", ["late"], ["bomb"]), node("Constant", [], ["late"], value=whole(huge))]


def _with_graph(directory: Path, graph: ModelProto | bytes) -> Path:
    """The directory with another graph of a block, and the manifest that fits it."""
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    (directory / GRAPH).write_bytes(data)
    true = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def change(made: Any) -> None:
        for record in (*made["files"], *(shard["graph"] for shard in made["shards"])):
            if record["path"] == GRAPH:
                record |= true

    return change_manifest(directory, change)


def _length(data: bytes) -> bytes:
    made, left = bytearray(), len(data)
    while left > 127:
        made.append(left & 127 | 128)
        left >>= 7
    return bytes([*made, left])


if __name__ == "__main__":
    run_module(Path(__file__).stem)
