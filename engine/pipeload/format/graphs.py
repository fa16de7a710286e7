"""A shard's `.onnx` file: its outputs, and its references to other files, checked against the manifest. Pure.

ONNX Runtime itself loads every tensor that the graph takes from a file and the session is not given: no plan would
count these bytes, and no hash would cover them. A graph is a protobuf message; only the few fields that can name a
file are read.
Source: onnx.proto (https://github.com/onnx/onnx).
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from pipeload.errors import ShardError
from pipeload.format.dtypes import ONNX_DTYPES
from pipeload.format.manifest import Shard
from pipeload.format.protobuf import fields, packed, text

__all__ = ["check_graph", "location_of", "no_graph"]

_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "initializer", 11: "input", 12: "output", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Kind of a message -> number of a field -> kind of the messages in it."""
_PLACE = ("location", "offset", "length")
"""What tells where a tensor lies: of others, such as weights that were packed before, onnxruntime reads files."""
_MOST_DEPTH = 100
_EXTERNAL = 1

_Place = tuple[str | None, str, str, str, tuple[int, ...]]
"""dtype, location, offset, length and shape of a tensor that lies in another file."""


@dataclass(slots=True)
class _Found:
    taken: list[tuple[str, _Place]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def no_graph(shard: Shard, error: Exception) -> ShardError:
    """The error for a file that is no ONNX graph, and why."""
    return ShardError(f"'{shard.graph.path}' is no ONNX graph: {error}. Copy or export the model again.")


def check_graph(shard: Shard, data: bytes) -> None:
    """Check that the graph takes exactly the shard's tensors from files, and makes exactly its outputs.

    Args:
        shard: the shard, of a validated manifest.
        data: its `.onnx` file.

    Raises:
        ShardError: it is no ONNX graph, or another shard's.
    """
    name, found = shard.graph.path, _Found()
    try:
        _collect("model", memoryview(data), 0, found)
    except (ValueError, IndexError) as error:
        raise no_graph(shard, error) from error
    expected: dict[str, _Place] = {}
    if shard.weights is not None:
        location = location_of(shard.weights.path, name)
        for spec in shard.tensors:
            expected[spec.name] = (spec.dtype, location, str(spec.offset), str(spec.nbytes), spec.shape)
    faults = [f"it takes '{key}' from a file in the middle of the graph" for key in found.hidden]
    faults += [
        f"it takes '{key}' from {place}, the manifest says {expected.get(key, 'nothing of it')}"
        for key, place in found.taken
        if expected.get(key) != place
    ]
    faults += [f"it does not take '{key}'" for key in sorted(expected.keys() - {key for key, _ in found.taken})]
    if set(found.outputs) != set(shard.outputs):
        faults.append(f"it makes {sorted(found.outputs)}, the manifest says {sorted(shard.outputs)}")
    if faults:
        raise ShardError(
            f"'{name}' is not the graph that the manifest describes: {faults[0][:1000]}"
            f"{f'; and {len(faults) - 1} more' if faults[1:] else ''}. Export the model again."
        )


def location_of(weights: str, graph: str) -> str:
    """How a graph names a weights file; both paths are relative to the model directory."""
    # Of absolute paths: for others the library asks for the working directory twice, and the host may change it in
    # between.
    return posixpath.relpath(f"/{weights}", f"/{posixpath.dirname(graph)}")


def _collect(kind: str, data: memoryview, depth: int, found: _Found) -> None:
    """Note the tensors that a message and all within it take from files, and the outputs of the outermost graph."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    outermost = kind == "graph" and depth == 1
    for number, value in fields(data):
        child = _CHILDREN[kind].get(number)
        if child is None or isinstance(value, int):
            continue
        if child in ("initializer", "tensor"):
            name, place = _tensor(value)
            if place and outermost and child == "initializer":
                found.taken.append((name, place))
            elif place:
                found.hidden.append(name)
        elif child in ("input", "output"):
            if outermost and child == "output":
                found.outputs.append(text(dict(fields(value)).get(1, b"")))
        else:
            _collect(child, value, depth + 1, found)


def _tensor(data: memoryview) -> tuple[str, _Place | None]:
    """A tensor's name, and its place if that is in another file."""
    name, dtype, dims, external, entries = "", None, [], False, {}
    for number, value in fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else packed(value)
        elif number == 2 and isinstance(value, int):
            dtype = ONNX_DTYPES.get(value)
        elif number == 8:
            name = text(value)
        elif number == 13 and not isinstance(value, int):
            entry = dict(fields(value))
            key = text(entry.get(1, b""))
            if key not in _PLACE or key in entries:
                raise ValueError(f"the place of tensor {name!r} in a file has the part {key!r}, or has it twice")
            entries[key] = text(entry.get(2, b""))
        elif number == 14:
            external = value == _EXTERNAL
    if not external and not entries:
        return name, None
    place = (entries.get("location", ""), entries.get("offset", "0"), entries.get("length", ""))
    return name, (dtype, *place, tuple(dims))
