"""The signature of a part of a graph: equal parts do the same with weights of the same shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import onnx
from onnx import AttributeProto, NodeProto, helper

from pipeload_export.cut.flow import Flow
from pipeload_export.graph.graph import FLOATS

__all__ = ["signature"]

_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean"})


def signature(flow: Flow, segment: Sequence[int], begin: str, end: str) -> bytes:
    """Equal for segments that do the same with weights of the same shapes; names do not count."""
    graph = flow.graph
    digests: dict[str, bytes] = {begin: b"begin"}

    def digest_of(name: str) -> bytes:
        if name in digests:
            return digests[name]
        if name in graph.constants:
            # Not the values: neighbouring layers may differ in a mask or a scale.
            return repr(("constant", graph.constants[name].dtype, graph.constants[name].shape)).encode()
        dtype, shape = graph.types.get(name, (0, None))
        if name in flow.constant:
            return repr(("computed constant", dtype, shape)).encode()
        if dtype in FLOATS and any(value.name == name for value in graph.inputs):
            sizes = [size if isinstance(size, int) else None for size in shape or ()]
            return repr(("input", dtype, sizes)).encode()
        return b"shared"

    for index in segment:
        node = graph.nodes[index]
        inputs = [digest_of(name) if name else b"none" for name in node.input]
        if node.op_type in _COMMUTATIVE:
            inputs.sort()
        parts = [node.domain.encode(), node.op_type.encode(), *_attributes(node, graph.opsets), *inputs]
        base = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
        digests.update((name, base + bytes([place])) for place, name in enumerate(node.output) if name)
    return digests[end] + flow.bytes_of(segment).to_bytes(8, "little")


def _attributes(node: NodeProto, opsets: dict[str, int]) -> list[bytes]:
    """A node's attributes without those that have the operator's default value, which exporters may write or not."""
    defaults: dict[str, AttributeProto] = {}
    # onnxruntime has operators in ONNX's name that this version, or ONNX, does not have.
    with suppress(onnx.defs.SchemaError):
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        defaults = {name: item.default_value for name, item in schema.attributes.items()}
    return sorted(
        _attribute_bytes(item)
        for item in node.attribute
        if item.name not in defaults or not _same_value(item, defaults[item.name])
    )


def _same_value(one: AttributeProto, two: AttributeProto) -> bool:
    return one.type == two.type and bool(helper.get_attribute_value(one) == helper.get_attribute_value(two))


def _attribute_bytes(item: AttributeProto) -> bytes:
    if item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        # Names inside subgraphs differ from layer to layer.
        nodes: list[NodeProto] = [node for graph in (item.g, *item.graphs) for node in graph.node]
        return f"{item.name}:{[node.op_type for node in nodes]}".encode()
    return bytes(item.SerializeToString(deterministic=True))
