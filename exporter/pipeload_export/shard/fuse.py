"""A shard's graph -> the same graph with fused operators, as the engine will run it.

onnxruntime optimises the graph and saves it. Weights of products take no part: they are external data in a sparse file
of zeros, and onnxruntime writes an initializer that it did not touch back as the same reference. Optimisers that
compute with the values of weights are switched off. Other constants are there with their values, because arithmetic on
them may be computed in advance. The level is "extended", which is portable; the layouts of level "all" belong to one
kind of CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from pipeload.errors import ExportError
from pipeload.format.dtypes import ONNX_DTYPES
from pipeload_export.graph.external_data import external_initializer
from pipeload_export.graph.graph import FLOATS, Constant, tensor_proto
from pipeload_export.graph.runtime import LEVEL, NOT_APPLIED, open_session, session_options
from pipeload_export.graph.types import elem_type_of
from pipeload_export.graph.validity import check_model, runtime_ops, version_of

__all__ = ["INLINE_BYTES", "Fused", "fuse", "is_external"]

INLINE_BYTES = 1024
"""Smaller constants stay in the graph's file, unless they are weights."""
_SUSPECTS = ("SimplifiedLayerNormFusion", "LayerNormFusion", "GeluFusionL1", "GeluFusionL2")
"""Optimisers that may use an operator in a version of ONNX that does not have it; switched off one after another."""

_RMS_NORM_OPSET = 23
"""The first version of ONNX that has RMSNormalization."""
_WEIGHT_OPS = frozenset(
    {
        *("Conv", "FusedMatMul", "Gemm", "LayerNormalization", "MatMul"),
        *("MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul", "RMSNormalization"),
    }
)
"""Operators that never become constant, because an activation goes into them."""
_RESIZE_OPS = frozenset({"Resize", "Upsample"})
"""Operators whose sizes and scales onnxruntime reads when it makes a session."""
_MOST_BYTES = 64 << 20
"""Constants of other operators up to this size are given to onnxruntime with their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A shard's graph whose large constants are outside.

    Attributes:
        model: initializers that are in `external` have no values and no place in a file yet.
        external: initializers that go into the weights file.
        dtypes: element types of the outputs, by name.
    """

    model: ModelProto
    external: dict[str, Constant]
    dtypes: dict[str, int]


def is_external(constant: Constant) -> bool:
    """Whether a constant's values go into the weights file instead of the graph's file."""
    if constant.dtype not in ONNX_DTYPES:
        return False
    # Scales and biases of any length: otherwise small ones would make every layer's graph a different one.
    return constant.nbytes >= INLINE_BYTES or (constant.dtype in FLOATS and prod(constant.shape) > 1)


def fuse(
    model: ModelProto, constants: Mapping[str, Constant], work: Path, *, computes_constants: bool
) -> tuple[Fused, Fused | None]:
    """Optimise a shard's graph.

    Args:
        model: nodes, inputs and outputs; no initializers.
        constants: the initializers that the nodes use.
        work: a folder for temporary files.
        computes_constants: whether the graph has nodes on constants only, which must stay as they are.

    Returns:
        The graph as it was, and the optimised one, or None where onnxruntime's is not valid ONNX.
    """
    inside = _read_early(model)
    external = {name: constant for name, constant in constants.items() if name not in inside and is_external(constant)}
    valued = set() if computes_constants else _valued(model, external)
    folds = not computes_constants and sum(external[name].nbytes for name in valued) <= _MOST_BYTES
    zeros = {name: constant for name, constant in external.items() if not folds or name not in valued}
    given = ModelProto()
    given.CopyFrom(model)
    given.graph.initializer.extend(tensor_proto(n, c) for n, c in constants.items() if n not in zeros)
    fused, what = None, f"shard '{model.graph.name}'"
    with TemporaryDirectory(prefix=".fuse-", dir=work) as folder:
        places = _add_zeros(given, zeros, Path(folder))
        onnx.save(given, f"{folder}/given.onnx")
        dtypes = _optimise(Path(folder), what, ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ())
        off = [*NOT_APPLIED, *([] if folds else ["ConstantFolding"])]
        for count in range(len(_SUSPECTS) + 1):
            with suppress(ExportError):
                _optimise(Path(folder), what, LEVEL, [*off, *_SUSPECTS[:count]])
                fused = _read(Path(folder) / "optimised.onnx", given, places, constants, dtypes)
            if fused is not None:
                break
    _empty(given, external)
    return Fused(model=given, external=external, dtypes=dtypes), fused


def _read_early(model: ModelProto) -> set[str]:
    """Constants whose values onnxruntime wants when it makes a session; they stay inside the graph."""
    return {name for node in model.graph.node if node.op_type in _RESIZE_OPS for name in node.input[1:]}


def _valued(model: ModelProto, external: Collection[str]) -> set[str]:
    """Constants with which onnxruntime may compute, because of the nodes that take them."""
    return {
        name for node in model.graph.node if node.op_type not in _WEIGHT_OPS for name in node.input if name in external
    }


def _add_zeros(model: ModelProto, constants: Mapping[str, Constant], folder: Path) -> dict[int, str]:
    """Make every constant refer to a part of a sparse file. Returns offset -> name."""
    places: dict[int, str] = {}
    offset = 0
    for name, constant in constants.items():
        model.graph.initializer.append(external_initializer(name, constant, "zeros.bin", offset))
        places[offset] = name
        offset += -(-max(constant.nbytes, 1) // 4096) * 4096
    with (folder / "zeros.bin").open("wb") as file:
        file.truncate(offset)
    return places


def _optimise(folder: Path, what: str, level: ort.GraphOptimizationLevel, disabled: Collection[str]) -> dict[str, int]:
    options = session_options()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.intra_op_num_threads = 1
    session = open_session(folder / "given.onnx", what, options, disabled=disabled)
    return {value.name: elem_type_of(value.type) for value in session.get_outputs()}


def _read(
    path: Path,
    plain: ModelProto,
    places: Mapping[int, str],
    constants: Mapping[str, Constant],
    dtypes: dict[str, int],
) -> Fused | None:
    """The optimised graph, or None if an exporter may not write it.

    Raises:
        ExportError: it is not valid ONNX.
    """
    model = onnx.load(str(path), load_external_data=False)
    _rename_norms(model)
    if not runtime_ops(model) <= runtime_ops(plain):
        return None
    external: dict[str, Constant] = {}
    inside = _read_early(model)
    for proto in model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            external[proto.name] = constants[places[ExternalDataInfo(proto).offset or 0]]
        elif proto.name in places.values():
            return None  # computed from zeros
        else:
            constant = Constant(proto.data_type, tuple(proto.dims), partial(numpy_helper.to_array, proto))
            if proto.name not in inside and is_external(constant):
                array = constant.load()
                external[proto.name] = Constant(proto.data_type, array.shape, partial(_same, array))
    for given, kept in ((plain.graph.input, model.graph.input), (plain.graph.output, model.graph.output)):
        if [value.name for value in given] != [value.name for value in kept]:
            return None
    used = {node.domain for node in model.graph.node} | {"", *(entry.domain for entry in plain.opset_import)}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = plain.ir_version
    del model.metadata_props[:], model.graph.value_info[:]
    _empty(model, external)
    check_model(model)
    return Fused(model=model, external=external, dtypes=dtypes)


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _rename_norms(model: ModelProto) -> None:
    """Give an operator ONNX's name instead of onnxruntime's, from the version on that has it."""
    if version_of(model) < _RMS_NORM_OPSET:
        return
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization" and node.domain == "" and len(node.output) == 1:
            node.op_type = "RMSNormalization"


def _empty(model: ModelProto, external: Mapping[str, Constant]) -> None:
    """Take the values of the external initializers out of the model; their place in a file is not known yet."""
    for index, proto in enumerate(model.graph.initializer):
        if proto.name in external:
            model.graph.initializer[index].CopyFrom(
                TensorProto(
                    name=proto.name,
                    data_type=proto.data_type,
                    dims=proto.dims,
                    data_location=TensorProto.EXTERNAL,
                )
            )
