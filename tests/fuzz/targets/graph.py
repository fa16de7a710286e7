"""Graphs of shards, against the package onnx: no tensor in another file is overlooked."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import onnx
from tests.fuzz.mutations import damaged
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.format.casts import without_casts
from pipeload.format.graph_sizes import check_sizes
from pipeload.format.graphs import check_graph, location_of
from pipeload.format.manifest import (
    ByteTerm,
    FileRecord,
    Manifest,
    Shard,
    Structure,
    TensorSpec,
    WeightSpec,
    WeightsRange,
)
from pipeload.format.protobuf import encoded, spans

__all__ = ["messages_of"]

_WEIGHTS = (
    WeightSpec(name="w", dtype="float32", shape=(4, 4), offset=4096),
    WeightSpec(name="n", dtype="bfloat16", shape=(4,), offset=4160, widened="n.wide"),
)
_DIGEST = "0" * 64
_SHARD = Shard(
    name="block.000",
    role="block",
    graph=FileRecord(path="shards/block.000.onnx", nbytes=1, sha256=_DIGEST),
    weights=WeightsRange(path="shards/block.000.safetensors", offset=4096, nbytes=72, sha256=_DIGEST),
    tensors=_WEIGHTS,
    inputs=("x",),
    outputs=("y",),
    structure="s",
)

_MANIFEST = Manifest(
    exporter="tests",
    source="",
    model_type="",
    task="",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("n", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("n", 4)),),
    edges=(),
    shards=(_SHARD,),
    structures={"s": Structure(activations=((ByteTerm(nbytes=64, dims=("n",)),),))},
    files=(),
    dims=("n",),
)


def _seed(*, with_branch: bool = False) -> bytes:
    """A graph that the shard may have."""
    helper, kind = onnx.helper, onnx.TensorProto
    assert _SHARD.weights is not None
    location = location_of(_SHARD.weights.path, _SHARD.graph.path)
    initializers = []
    for spec, number in zip(_WEIGHTS, (kind.FLOAT, kind.BFLOAT16), strict=True):
        tensor = kind(name=spec.name, data_type=number, dims=spec.shape, data_location=kind.EXTERNAL)
        for key, value in (("location", location), ("offset", str(spec.offset)), ("length", str(spec.nbytes))):
            tensor.external_data.add(key=key, value=value)
        initializers.append(tensor)
    nodes = [
        helper.make_node("Cast", ["n"], ["n.wide"], to=kind.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "n.wide"], ["y"]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Concat", ["size", "size"], ["sizes"], axis=0),
        helper.make_node("Slice", ["sizes", "size", "size"], ["cut"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"], value=helper.make_tensor("", kind.INT64, [1], [1])),
        helper.make_node("Expand", ["zeros", "size"], ["wide"]),
        helper.make_node("Range", ["first", "last", "step"], ["range"]),
        helper.make_node("Resize", ["x", "", "scales"], ["resized"], scales=[1.0, 2.0]),
    ]
    initializers += [helper.make_tensor(name, kind.INT64, [], [5]) for name in ("first", "last", "step")]
    if with_branch:
        value = helper.make_tensor("c", kind.FLOAT, [1], [1.0])
        branch = helper.make_graph([helper.make_node("Constant", [], ["b"], value=value)], "b", [], [])
        nodes.insert(0, helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", kind.FLOAT, ["n", 4])], [value("y", kind.FLOAT, ["n", 4])], initializers
    )
    made: bytes = helper.make_model(graph).SerializeToString()
    return made


def messages_of(chance: Random, pool: Any) -> bytes:
    """A protobuf message with fields exchanged at any depth, its lengths right; sometimes damaged bytes of it."""
    data: bytes = chance.choice(pool)
    if chance.random() < 0.25:
        return damaged(chance, data, pool)
    try:
        for _ in range(chance.choice((1, 1, 2, 3))):
            data = _changed(chance, memoryview(data), 0)
    except (ValueError, IndexError, OverflowError):
        return damaged(chance, data, pool)
    return data


def _changed(chance: Random, message: memoryview, depth: int) -> bytes:
    fields = [(number, value, bytes(whole)) for number, value, whole in spans(message)]
    if not fields:
        return encoded(chance.randrange(1, 30), chance.choice((0, 1, b"", b"x", bytes(4))))
    at = int(chance.random() * len(fields))
    number, value, whole = fields[at]
    pieces = [one for _, _, one in fields]
    here = chance.random()
    if isinstance(value, memoryview) and here < (0.8 if depth < 8 else 0.3):
        try:
            if len(value) > 1:
                pieces[at] = encoded(number, _changed(chance, value, depth + 1))
                return b"".join(pieces)
        except (ValueError, IndexError, OverflowError):
            pieces[at] = encoded(number, damaged(chance, bytes(value)))
            return b"".join(pieces)
    match int(chance.random() * 7):
        case 0:
            del pieces[at]
        case 1:
            pieces.insert(int(chance.random() * (len(pieces) + 1)), whole)
        case 2:
            raw = bytes(value) if isinstance(value, memoryview) else value
            pieces[at] = encoded(chance.choice((1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 20, 22, 25)), raw)
        case 3:
            pieces[at] = encoded(number, chance.choice((0, 1, 2, 7, 2**31, 2**32 + 1, 2**63, 2**64 - 1)))
        case 4:
            pieces[at] = encoded(number, chance.choice((b"", b"w", b"x", b"../w", b"location", b"\xff", whole)))
        case 5:
            other = int(chance.random() * len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        case _:
            pieces[at] = damaged(chance, whole)
    return b"".join(pieces)


def _elsewhere(message: Any) -> Iterator[Any]:
    """All tensors that lie in other files, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if isinstance(part, onnx.TensorProto) and (part.data_location == 1 or part.external_data):
                yield part
            yield from _elsewhere(part)


def _prepare() -> Trial:
    def trial(data: bytes) -> bool:
        check_graph(_SHARD, data)
        changed = without_casts(_SHARD, data)
        check_sizes(_MANIFEST, _SHARD, data if changed is None else changed)
        try:
            model = onnx.load_model_from_string(data)
            onnx.load_model_from_string(changed or b"")
        except Exception:  # noqa: BLE001 - protobuf has no common base of its errors
            return True  # neither does onnxruntime take it
        wanted = {spec.name: (list(spec.shape), str(spec.offset), str(spec.nbytes)) for spec in _WEIGHTS}
        # Inference never looks at what only training has.
        model.ClearField("training_info")
        for tensor in _elsewhere(model):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = list(tensor.dims), entries.get("offset", "0"), entries.get("length", "")
            if wanted.get(tensor.name) != place:
                raise Wrong("a tensor lies in another file, where no check has seen it", f"{tensor.name}: {place}")
        return True

    return trial


TARGETS = (
    Target(
        name="graph", what="graphs of shards", prepare=_prepare, mutate=messages_of,
        seeds=lambda: [_seed(), _seed(with_branch=True)],
    ),
)  # fmt: skip
