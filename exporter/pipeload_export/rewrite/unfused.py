"""Fused products with a constant matrix -> the product, and what was fused with it, so that the product can be rounded.

```
FusedGemm(x, weight, bias, activation)   -> Gemm(x, weight, bias), Relu
FusedMatMul(x, weight, alpha)            -> FusedMatMul(x, weight), Mul
```
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, helper

from pipeload_export.graph.graph import Graph, attribute, known_constant

__all__ = ["take_products_apart"]

_DOMAIN = "com.microsoft"
_PARAMETERS = {"activation_alpha": "alpha", "activation_beta": "beta", "activation_gamma": "gamma"}


def take_products_apart(graph: Graph) -> None:
    """Take fused products apart; the graph changes."""
    graph.nodes = [part for node in graph.nodes for part in _parts(graph, node)]


def _parts(graph: Graph, node: NodeProto) -> Iterator[NodeProto]:
    if node.domain != _DOMAIN or len(node.input) < 2 or node.input[1] not in graph.constants:
        yield node
    elif node.op_type == "FusedGemm":
        yield from _gemm(node)
    elif node.op_type == "FusedMatMul" and attribute(node, "alpha", 1.0) != 1.0:
        yield from _scaled(graph, node)
    else:
        yield node


def _gemm(node: NodeProto) -> Iterator[NodeProto]:
    product, (output,) = NodeProto(), node.output
    product.CopyFrom(node)
    product.op_type, product.domain, product.output[:] = "Gemm", "", [f"{output}.before"]
    del product.attribute[:]
    own = [item for item in node.attribute if item.name != "activation" and item.name not in _PARAMETERS]
    product.attribute.extend(own)
    kind: bytes = attribute(node, "activation")
    given = {name: attribute(node, fused) for fused, name in _PARAMETERS.items() if attribute(node, fused) is not None}
    yield product
    yield helper.make_node(kind.decode(), product.output, [output], **given)


def _scaled(graph: Graph, node: NodeProto) -> Iterator[NodeProto]:
    product, (output,) = NodeProto(), node.output
    product.CopyFrom(node)
    product.output[:] = [f"{output}.before"]
    kept = [item for item in node.attribute if item.name != "alpha"]
    del product.attribute[:]
    product.attribute.extend(kept)
    scale = f"{output}.scale"
    graph.constants[scale] = known_constant(np.array(attribute(node, "alpha"), np.float32))
    yield product
    yield helper.make_node("Mul", [product.output[0], scale], [output])
