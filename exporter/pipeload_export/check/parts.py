"""Run an unsplit graph whose weights lie in a checkpoint, in bounded memory.

The nodes are taken in their order, as many at a time as have weights of a certain size; what later nodes need is kept.
Where the parts begin has nothing to do with shards: the graph is neither normalised nor cut, and answers as onnxruntime
would answer over the whole of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, helper

from pipeload.notify import Notify
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_session
from pipeload_export.graph.graph import Constant, Graph, node_inputs, tensor_proto
from pipeload_export.graph.load import load
from pipeload_export.graph.runtime import LEVEL, NOT_APPLIED, open_session, session_options
from pipeload_export.graph.types import plain_model
from pipeload_export.source.places import Weights

__all__ = ["run_parts"]

_PART_BYTES = 256 << 20
"""The most bytes of weights in a part, but for a single node that has more."""
_FED_BYTES = 64 << 10
"""Larger constants are inputs of their part, without a copy; operators want the values of small ones early."""
_NO_TENSORS = ("Sequence", "SplitToSequence", "Optional")
"""Operators, or beginnings of their names, that make what cannot leave a part."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Consecutive nodes, the constants and tensors that they take, and the tensors that are wanted of them."""

    nodes: list[NodeProto]
    constants: dict[str, Constant]
    taken: list[str]
    made: list[str]


def run_parts(
    path: Path,
    weights: Weights,
    wanted: Iterable[str],
    cases: Sequence[Case],
    progress: Notify,
    *,
    narrowed: Collection[str] = (),  # noqa: ARG001 - a checkpoint's caches are float32
    optimised: bool = False,
) -> list[Arrays]:
    """The outputs `wanted` of the unsplit graph for each case, as `run_unsplit` gives them.

    Raises:
        ExportError: the graph does not run.
    """
    graph = load(path, weights)
    names = list(wanted)
    states: list[Arrays] = [dict(case.inputs) for case in cases]
    parts = list(_parts(graph, names))
    last = {name: number for number, part in enumerate(parts) for name in part.taken}
    for number, part in enumerate(parts):
        progress("run the unsplit model", number, len(parts))
        _run_part(graph, part, cases, states, optimised=optimised)
        for state in states:
            for name in [name for name in state if last.get(name, -1) <= number and name not in names]:
                del state[name]
        graph.forget()
    progress("run the unsplit model", len(parts), len(parts))
    return [{name: state[name] for name in names} for state in states]


def _parts(graph: Graph, wanted: Collection[str]) -> Iterator[_Part]:
    used: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        used.update(dict.fromkeys(node_inputs(node), place))
    begin, gathered, inside = 0, dict[str, int](), set[str]()
    for place, node in enumerate(graph.nodes):
        gathered.update({name: graph.constants[name].nbytes for name in node_inputs(node) if name in graph.constants})
        if node.op_type.startswith(_NO_TENSORS):
            inside.update(node.output)
        after = graph.nodes[place + 1] if place + 1 < len(graph.nodes) else None
        more = (
            [name for name in node_inputs(after) if name in graph.constants and name not in gathered] if after else []
        )
        full = sum(gathered.values()) + sum(graph.constants[name].nbytes for name in more) > _PART_BYTES
        if after is None or (full and not any(used.get(name, -1) > place for name in inside)):
            yield _part(graph, begin, place + 1, used, wanted)
            begin, gathered, inside = place + 1, {}, set()


def _part(graph: Graph, begin: int, end: int, used: dict[str, int], wanted: Collection[str]) -> _Part:
    nodes = graph.nodes[begin:end]
    made = [name for node in nodes for name in node.output if name]
    names = dict.fromkeys(name for node in nodes for name in node_inputs(node))
    return _Part(
        nodes=nodes,
        constants={name: graph.constants[name] for name in names if name in graph.constants},
        taken=[name for name in names if name not in graph.constants and name not in set(made)],
        made=[name for name in made if used.get(name, -1) >= end or name in wanted],
    )


def _run_part(graph: Graph, part: _Part, cases: Sequence[Case], states: list[Arrays], *, optimised: bool) -> None:
    fed = {name: constant for name, constant in part.constants.items() if constant.nbytes >= _FED_BYTES}
    inputs = [helper.make_tensor_value_info(name, one.dtype, one.shape) for name, one in fed.items()]
    for name in part.taken:
        array = states[0][name]
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, dtype, [None] * array.ndim))
    outputs = [helper.make_empty_tensor_value_info(name) for name in part.made]
    values = [tensor_proto(name, one) for name, one in part.constants.items() if name not in fed]
    options: ort.SessionOptions = session_options()
    if optimised:
        options.graph_optimization_level = LEVEL
    model = plain_model(graph, part.nodes, inputs, outputs, values).SerializeToString()
    session = open_session(model, "the unsplit graph", options, disabled=NOT_APPLIED if optimised else ())
    weights = {name: np.ascontiguousarray(constant.values()) for name, constant in fed.items()}
    for case, state in zip(cases, states, strict=True):
        given = {name: state[name] for name in part.taken}
        state.update(run_session(session, part.made, weights | given, f"The unsplit graph ({case.name})"))
