"""A shard's graph with weights of 16 bits -> the same graph over the weights as the engine widens them. Pure.

In the file, an initializer of 16 bits goes through a `Cast` to float32, so that any ONNX program runs the shard. The
engine makes the float32 values while it loads the shard: its graph has them as initializers, and no `Cast`.
"""

from __future__ import annotations

from pipeload.errors import ShardError
from pipeload.format.dtypes import ONNX_DTYPES, WIDE
from pipeload.format.graphs import location_of, no_graph
from pipeload.format.manifest import Shard, WeightSpec
from pipeload.format.protobuf import encoded, fields, spans, text

__all__ = ["without_casts"]

_GRAPH = 7
"""Of a model."""
_NODE, _INITIALIZER = 1, 5
"""Of a graph."""
_INPUT, _OUTPUT, _OPERATOR, _ATTRIBUTE = 1, 2, 4, 5
"""Of a node."""
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
"""Of a tensor."""
_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}
_EXTERNAL = 1


def without_casts(shard: Shard, data: bytes) -> bytes | None:
    """The graph for weights that are widened as they are loaded; None where the shard has none.

    Its initializers keep the places in the weights file that they have, where nothing of their new size lies: each has
    to be given to the session.

    Args:
        shard: the shard, of a validated manifest.
        data: its `.onnx` file, checked by `check_graph`.

    Raises:
        ShardError: the graph does not cast the tensors that the manifest says, or a name in it is no text.
    """
    casts = {spec.name: spec for spec in shard.tensors if spec.widened is not None}
    if not casts:
        return None
    model, done = bytearray(), set[str]()
    try:
        for number, value, whole in spans(memoryview(data)):
            if number == _GRAPH and isinstance(value, memoryview):
                model += encoded(_GRAPH, _graph(shard, value, casts, done))
            else:
                model += whole
    except (ValueError, IndexError) as error:
        # Names of nodes, which no other check reads.
        raise no_graph(shard, error) from error
    if missing := casts.keys() - done:
        raise ShardError(
            f"'{shard.graph.path}' is not the graph that the manifest describes: it does not cast "
            f"'{min(missing)}' to '{casts[min(missing)].widened}'. Export the model again."
        )
    return bytes(model)


def _graph(shard: Shard, data: memoryview, casts: dict[str, WeightSpec], done: set[str]) -> bytes:
    graph = bytearray()
    for number, value, whole in spans(data):
        if number == _NODE and isinstance(value, memoryview) and (name := _cast(value, casts)):
            done.add(name)
        elif number == _INITIALIZER and isinstance(value, memoryview) and (spec := casts.get(_name(value))):
            graph += encoded(_INITIALIZER, _widened(shard, spec))
        else:
            graph += whole
    return bytes(graph)


def _cast(node: memoryview, casts: dict[str, WeightSpec]) -> str | None:
    """The tensor that a node casts, if it is one of these, and becomes what the manifest says."""
    inputs, outputs, operator, attributes = [], [], "", 0
    for number, value in fields(node):
        if number == _INPUT:
            inputs.append(text(value))
        elif number == _OUTPUT:
            outputs.append(text(value))
        elif number == _OPERATOR:
            operator = text(value)
        elif number == _ATTRIBUTE:
            attributes += 1
    if operator != "Cast" or len(inputs) != 1 or inputs[0] not in casts or attributes != 1:
        return None
    return inputs[0] if outputs == [casts[inputs[0]].widened] else None


def _name(tensor: memoryview) -> str:
    return next((text(value) for number, value in fields(tensor) if number == _NAME), "")


def _widened(shard: Shard, spec: WeightSpec) -> bytes:
    assert shard.weights is not None
    assert spec.widened is not None
    location = location_of(shard.weights.path, shard.graph.path)
    entries = {"location": location, "offset": str(spec.offset), "length": str(spec.memory_bytes)}
    tensor = b"".join(encoded(_DIMS, size) for size in spec.shape)
    tensor += encoded(_DATA_TYPE, _NUMBERS[WIDE]) + encoded(_NAME, spec.widened.encode())
    for key, value in entries.items():
        tensor += encoded(_EXTERNAL_DATA, encoded(1, key.encode()) + encoded(2, value.encode()))
    return tensor + encoded(_DATA_LOCATION, _EXTERNAL)
