"""A graph as a model's file has it -> the same graph without detours, so that its layers can be compared.

Exporters leave Identity nodes, casts that change nothing, dead branches, and arithmetic on constants;
where a layer happens to share a constant with another, there is one more detour. All of these go. Compressed weights
stay compressed: a node whose result is larger than its inputs is not computed in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from pipeload_export.graph.graph import Constant, Graph, attribute, is_pure, known_constant, node_inputs, tensor_proto
from pipeload_export.graph.runtime import open_session, raise_shortage
from pipeload_export.graph.types import SMALL_BYTES, infer_types, plain_model, type_of

__all__ = ["drop_dead", "normalise"]

_NORM_EPSILON = 1e-12
"""Of onnxruntime's fused norms, where a graph does not say."""

_LAZY = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice", "Split", "Gather"})
"""Operators on large constants, computed when the result is written: until then it occupies no memory."""


def normalise(graph: Graph) -> bool:
    """Fold the graph's constants, remove nodes that are dead or without effect, infer the types of its tensors.

    Returns:
        Whether nodes or constants changed.
    """
    changed = [drop_dead(graph), _separate_sums(graph), _fold(graph)]
    graph.types = infer_types(graph)
    changed += [_drop_detours(graph), _ask_before_casts(graph), drop_dead(graph)]
    return any(changed)


def drop_dead(graph: Graph, kept_names: Iterable[str] = ()) -> bool:
    """Remove nodes that no output depends on, and constants that no node uses. Returns whether there were any.

    Args:
        graph: sorted.
        kept_names: tensors and constants that stay, beside the outputs.
    """
    before = len(graph.nodes), len(graph.constants)
    needed = {*graph.output_names, *kept_names}
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(filter(None, node.output)):
            needed.update(node_inputs(node))
            kept.append(node)
    graph.nodes = kept[::-1]
    graph.constants = {name: c for name, c in graph.constants.items() if name in needed}
    return before != (len(graph.nodes), len(graph.constants))


def _separate_sums(graph: Graph) -> bool:
    """Take fused residual norms apart: the boundary between two layers often lies inside, after the sum.

    Where the sum is used as well, two tensors are alive behind the norm, although one makes the other. onnxruntime has
    both norms in ONNX's name, whatever the opset.
    """
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        simple = node.op_type == "SkipSimplifiedLayerNormalization"
        skip = simple or node.op_type == "SkipLayerNormalization"
        if not skip or node.domain != "com.microsoft" or any(node.output[1:3]):
            nodes.append(node)
            continue
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}.sum"
        inputs = [*node.input, "", ""][:5]
        bias, sides = inputs[3 if simple else 4], list(inputs[:2])
        if bias:
            sides[0] = f"{total}.biased"
            nodes.append(helper.make_node("Add", [inputs[0], bias], [sides[0]]))
        nodes.append(helper.make_node("Add", sides, [total]))
        kind, terms = ("SimplifiedLayerNormalization", inputs[2:3]) if simple else ("LayerNormalization", inputs[2:4])
        epsilon = attribute(node, "epsilon", _NORM_EPSILON)
        taken = [total, *filter(None, terms)]
        nodes.append(helper.make_node(kind, taken, [node.output[0]], axis=-1, epsilon=epsilon, stash_type=1))
    changed = len(nodes) != len(graph.nodes)
    graph.nodes = nodes
    return changed


def _fold(graph: Graph) -> bool:
    """Replace nodes that depend on constants only by their results, small ones all together in one session."""
    small: list[NodeProto] = []
    small_names = {name for name, c in graph.constants.items() if c.nbytes < SMALL_BYTES}
    outputs = set(graph.output_names)
    kept = []
    for node in graph.nodes:
        names = list(node_inputs(node))
        foldable = is_pure(node) and names and not outputs.intersection(node.output)
        if foldable and node.op_type == "Identity" and names[0] in graph.constants:
            graph.constants[node.output[0]] = graph.constants[names[0]]
            if names[0] in small_names:
                small_names.add(node.output[0])
        elif foldable and small_names.issuperset(names) and not _widens(graph, node):
            small.append(node)
            small_names.update(node.output)
        elif foldable and _fold_large(graph, node, small_names):
            pass
        else:
            kept.append(node)
    results = _evaluate(graph, small)
    unfolded: set[str] = set()
    remaining = []
    for node in small:
        limit = max(SMALL_BYTES, sum(graph.constants[n].nbytes for n in node_inputs(node) if n in graph.constants))
        arrays = [results.get(name) for name in node.output if name]
        if any(a is None or a.nbytes > limit for a in arrays) or unfolded.intersection(node_inputs(node)):
            unfolded.update(node.output)
            remaining.append(node)
            continue
        graph.constants.update({name: known_constant(results[name]) for name in node.output if name})
    nodes = remaining + kept
    changed = len(nodes) != len(graph.nodes)
    graph.nodes = nodes
    return changed


def _widens(graph: Graph, node: NodeProto) -> bool:
    """Whether the node may be a part of dequantisation: it takes a matrix of a type below 32 bits."""
    if node.op_type not in ("Cast", "CastLike", "DequantizeLinear"):
        return False
    name = node.input[0]
    constant = graph.constants.get(name)
    return constant is None or (constant.is_matrix and constant.nbytes < 4 * prod(constant.shape))


def _fold_large(graph: Graph, node: NodeProto, small_names: set[str]) -> bool:
    """Replace a node on large constants by constants that are computed on demand. Returns whether it was done."""
    names = list(node_inputs(node))
    if node.op_type not in _LAZY or node.domain not in ("", "ai.onnx"):
        return False
    if any(name not in graph.constants for name in names):
        return False
    known = {name: graph.constants[name] for name in names}
    inputs = [helper.make_tensor_value_info(n, c.dtype, c.shape) for n, c in known.items() if n not in small_names]
    values = [tensor_proto(n, c) for n, c in known.items() if n in small_names]
    ends = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    try:
        inferred = onnx.shape_inference.infer_shapes(plain_model(graph, [node], inputs, ends, values), data_prop=True)
    except Exception:  # noqa: BLE001 - the node stays in the graph, which is always correct
        return False
    types = [type_of(value) for value in inferred.graph.output]
    made = []
    for name, (dtype, shape) in zip(filter(None, node.output), types, strict=True):
        if not dtype or shape is None or not all(isinstance(size, int) for size in shape):
            return False
        sizes = tuple(int(size) for size in shape if isinstance(size, int))
        made.append(Constant(dtype, sizes, _loader(graph, node, name, known)))
    if sum(c.nbytes for c in made) > max(SMALL_BYTES, sum(c.nbytes for c in known.values())):
        return False
    for name, constant in zip(filter(None, node.output), made, strict=True):
        if constant.nbytes < SMALL_BYTES:
            constant = known_constant(constant.values())
            small_names.add(name)
        graph.constants[name] = constant
    return True


def _loader(graph: Graph, node: NodeProto, name: str, known: Mapping[str, Constant]) -> Callable[[], NDArray[Any]]:
    if node.op_type == "Transpose":
        permutation = attribute(node, "perm")
        # A view: the writer copies it piece by piece.
        return lambda: known[node.input[0]].load().transpose(permutation)
    if node.op_type in ("Squeeze", "Unsqueeze", "Flatten", "Reshape"):
        source = known[node.input[0]]

        def reshaped() -> NDArray[Any]:
            return source.load().reshape(graph.constants[name].shape)

        return reshaped
    single = Graph([node], dict(known), [], [], graph.opsets)
    return lambda: _evaluate(single, [node])[name]


def _evaluate(graph: Graph, nodes: list[NodeProto]) -> dict[str, NDArray[Any]]:
    """Outputs of nodes that depend on the graph's constants only; empty when onnxruntime cannot compute them."""
    made = {name for node in nodes for name in node.output if name}
    used = dict.fromkeys(name for node in nodes for name in node_inputs(node) if name not in made)
    if not nodes:
        return {}
    names = sorted(made)
    values = [tensor_proto(name, graph.constants[name]) for name in used]
    model = plain_model(graph, nodes, [], [helper.make_empty_tensor_value_info(name) for name in names], values)
    try:
        arrays = open_session(model.SerializeToString(), "constants").run(names, {})
    except Exception as error:  # noqa: BLE001 - onnxruntime's have no common base; unfolded nodes are always correct
        raise_shortage(error)
        return {}
    return {n: a for n, a in zip(names, arrays, strict=True) if isinstance(a, np.ndarray) and a.dtype != object}


def _drop_detours(graph: Graph) -> bool:
    """Remove Identity, and Cast to the type that a tensor already has."""
    outputs, inner = set(graph.output_names), _captured(graph)
    producers, given = graph.producers(), {value.name for value in graph.inputs} | set(graph.constants)
    uses = graph.consumers()
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if not _is_detour(graph, node) or inner.intersection((node.input[0], node.output[0])):
            kept.append(node)
            continue
        source, target = node.input[0], node.output[0]
        if target not in outputs:
            renamed[target] = source
        elif source not in given and source not in outputs and len(uses.get(source, ())) == 1:
            # Callers know the output's name, so the node before takes it over.
            maker = producers[source]
            maker.output[list(maker.output).index(source)] = target
            producers[target] = maker
        else:
            kept.append(node)
    changed = len(kept) != len(graph.nodes)
    graph.nodes = kept
    return changed


def _ask_before_casts(graph: Graph) -> bool:
    """Take shapes of what is cast instead of the result, which is then only made where its values are read."""
    producers = graph.producers()
    changed = False
    for node in graph.nodes:
        while node.op_type in ("Shape", "Size") and node.input[0] in producers:
            maker = producers[node.input[0]]
            if maker.op_type != "Cast" or maker.domain not in ("", "ai.onnx"):
                break
            node.input[0] = maker.input[0]
            changed = True
    return changed


def _is_detour(graph: Graph, node: NodeProto) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Identity":
        return True
    known = graph.types.get(node.input[0], (0, None))[0] if node.op_type == "Cast" else 0
    return bool(known) and known == attribute(node, "to")


def _captured(graph: Graph) -> set[str]:
    """Names that subgraphs take from the graph around them: renaming would have to enter the subgraphs."""
    return {name for node in graph.nodes for name in node_inputs(node) if name not in node.input}
