"""`.onnx` files as the exporter gets them."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.fuzz.target import Target, Trial, Wrong
from tests.fuzz.targets.graph import messages_of

from pipeload.notify import silent
from pipeload_export.boundary import boundary
from pipeload_export.cut.blocks import find_cuts
from pipeload_export.cut.tables import lift_tables
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise
from pipeload_export.rewrite.in_place import write_in_place
from pipeload_export.rewrite.settings import fix_settings
from pipeload_export.source.sources import Unsplit, find_source
from pipeload_export.split import split

_WIDTH, _BLOCKS = 8, 3
_DATA = "model.onnx_data"


def _seed(*, odd: bool = False, outside: bool = False) -> bytes:
    """A small model of equal blocks; an odd one has a branch, a function of its own, and constants in nodes."""
    chance = np.random.default_rng(0)
    nodes, weights = [helper.make_node("Gather", ["table", "ids"], ["h0"])], []

    def weight(name: str, *shape: int) -> None:
        weights.append(numpy_helper.from_array(chance.standard_normal(shape).astype(np.float32), name))

    weight("table", 12, _WIDTH)
    for block in range(_BLOCKS):
        before, after = f"h{block}", f"h{block + 1}"
        weight(f"w{block}", _WIDTH, _WIDTH)
        nodes += [
            helper.make_node("MatMul", [before, f"w{block}"], [f"m{block}"]),
            helper.make_node("Tanh", [f"m{block}"], [f"t{block}"]),
            helper.make_node("Add", [before, f"t{block}"], [after]),
        ]
    last = f"h{_BLOCKS}"
    opsets, functions = [helper.make_opsetid("", 17)], []
    if odd:
        one = numpy_helper.from_array(np.ones(1, np.float32), "one")
        nodes += [helper.make_node("Constant", [], ["c"], value=one), helper.make_node("Mul", [last, "c"], ["scaled"])]
        nodes.append(helper.make_node("Own", ["scaled"], ["doubled"], domain="own"))
        branch = helper.make_graph(
            [helper.make_node("Identity", ["doubled"], ["inner"])], "b", [], [_value("inner", TensorProto.FLOAT)]
        )
        nodes.append(helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch))
        weights.append(numpy_helper.from_array(np.array(True), "flag"))
        opsets.append(helper.make_opsetid("own", 1))
        functions.append(
            helper.make_function(
                "own", "Own", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
            )
        )
    else:
        nodes.append(helper.make_node("Identity", [last], ["y"]))
    if outside:
        weights[1] = TensorProto(
            name="w0", data_type=TensorProto.FLOAT, dims=(_WIDTH, _WIDTH), data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", _DATA), ("offset", "0"), ("length", str(4 * _WIDTH * _WIDTH))):
            weights[1].external_data.add(key=key, value=value)
    graph = helper.make_graph(nodes, "g", [_value("ids", TensorProto.INT64)], [_value("y", TensorProto.FLOAT)], weights)
    made: bytes = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9).SerializeToString()
    return made


def _value(name: str, kind: int) -> Any:
    dims = ["batch", "length"] if kind == TensorProto.INT64 else ["batch", "length", _WIDTH]
    return helper.make_tensor_value_info(name, kind, dims)


def _files() -> tuple[Path, Path]:
    folder = Path(tempfile.mkdtemp())
    (folder / _DATA).write_bytes(bytes(4 * _WIDTH * _WIDTH))
    return folder, folder / "model.onnx"


def _prepare() -> Trial:
    warnings.simplefilter("ignore")
    folder, path = _files()

    def trial(data: bytes) -> bool:
        path.write_bytes(data)
        with boundary("The export failed", folder, None):
            if not isinstance(find_source(str(path), progress=silent), Unsplit):
                raise Wrong("a file is no graph")
            graph = load(path)
            fix_settings(graph)
            normalise(graph)
            write_in_place(graph)
            cuts = find_cuts(graph, whole=True)
            lift_tables(
                graph,
                block_bytes=cuts.block_bytes,
                activation={name for segment in cuts.segments for name in segment},
            )
        return True

    return trial


def _prepare_splits() -> Trial:
    warnings.simplefilter("ignore")
    folder, path = _files()
    shards = folder / "made" / "shards"

    def trial(data: bytes) -> bool:
        shutil.rmtree(shards.parent, ignore_errors=True)
        shards.mkdir(parents=True)
        path.write_bytes(data)
        with boundary("The export failed", folder, None):
            find_source(str(path), progress=silent)
            made = split(path, shards, whole=True)
        if not made.shards:
            raise Wrong("a model has no shards")
        onnx.load(shards.parent / made.shards[0].graph.path, load_external_data=False)
        return True

    return trial


TARGETS = (
    Target(
        name="onnx", what="`.onnx` files, up to the cuts", prepare=_prepare, mutate=messages_of, native=True, share=2,
        seeds=lambda: [_seed(), _seed(odd=True), _seed(outside=True)], memory_bytes=1 << 30, limit_s=20,
    ),
    Target(
        name="split", what="`.onnx` files, split whole", prepare=_prepare_splits, mutate=messages_of, native=True,
        seeds=lambda: [_seed(), _seed(odd=True), _seed(outside=True)], memory_bytes=2 << 30, limit_s=60, share=2,
    ),
)  # fmt: skip
