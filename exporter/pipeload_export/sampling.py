"""Small runs of the shards, which tell what the graphs do not: shapes of edges, sizes of intermediate tensors.

The shards run one after another on seeded inputs, at several sizes of each symbolic dimension. A shard that is built
like an earlier one does not run again: its outputs have the shapes that the earlier one's had. So a model costs about
as much as one block, however many blocks it has.

Which sizes go together is not written in a graph. Where the shards refuse independent ones, other plans are tried:
images of whole patches, symbols that are the sum of two others, as a length of cache and text together is, and masks
that hide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from pipeload.errors import ExportError
from pipeload.manifest import TensorSpec, evaluate_dim, symbols
from pipeload_export.fuse import Fused, external_initializer
from pipeload_export.graph import Constant, Graph, attribute

__all__ = ["Event", "Sampler"]

Arrays = dict[str, NDArray[Any]]

_SIZES = ((1, 2, 3), (4, 6, 9), (2, 5, 7), (3, 8, 10))
"""Sizes of the first, second ... symbol; three of each determine a polynomial of degree two."""
_EDGE_SIZES = (1, 3, 4)
"""Sizes for kernels that take some dimensions only where another is one. Never zero, on which kernels may crash."""
_MOST_POINTS = 30
_MOST_PATCHES = 64
_COMPARED = 3
_CLOSE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A node that ran: its index in the graph, and of each of its outputs the bytes and the shape."""

    node: int
    output_bytes: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How sizes are chosen.

    Attributes:
        fixed: symbols that have one size.
        sizes: symbols that have other sizes than usual.
        sums: symbols that are the sum of others.
        ones: integers are ones; otherwise zeros and ones.
        declared: outputs must have the shapes that the graph declares.
        partial: sizes that a shard refuses are left out, as long as most remain.
        wider: a plan that covers more, to be tried where this one works.
    """

    fixed: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ones: bool = False
    declared: bool = False
    partial: bool = False
    wider: _Plan | None = None

    def points(self, names: Sequence[str]) -> list[dict[str, int]]:
        free = [name for name in names if name not in self.fixed and name not in self.sums]
        choices = [self.sizes.get(name, _SIZES[place % len(_SIZES)]) for place, name in enumerate(free)]
        grid = list(product(*choices))
        if len(grid) > _MOST_POINTS:
            picked = np.random.default_rng(0).choice(len(grid), _MOST_POINTS, replace=False)
            grid = [grid[place] for place in sorted(picked)]
        points = []
        for sizes in grid:
            point = dict(self.fixed) | dict(zip(free, sizes, strict=True))
            points.append(point | {name: sum(point[part] for part in parts) for name, parts in self.sums.items()})
        return points


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Something that was done for a shard, so that it can be done again at other sizes."""

    shard: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused: Fused | None = None
    table: Constant | None = None
    like: int | None = None


class Sampler:
    """Runs the shards of one model in order.

    Args:
        graph: the model's.
        specs: the graph's inputs.
        last_use: tensor -> number of the last shard that takes it.

    Attributes:
        points: sizes of all symbols, for each run.
        shapes: tensor -> its shape in each of the runs.
    """

    def __init__(self, graph: Graph, specs: Sequence[TensorSpec], last_use: Mapping[str, int]) -> None:
        self._graph = graph
        self._specs = {spec.name: spec for spec in specs}
        self._last_use = last_use
        self._names = list(dict.fromkeys(name for spec in specs for dim in spec.shape for name in symbols(dim)))
        self._declared = {v.name: [dim.dim_param for dim in v.type.tensor_type.shape.dim] for v in graph.outputs}
        self._steps: list[_Step] = []
        self._begin(_Plan(), _Plan().points(self._names))

    @property
    def free_symbols(self) -> tuple[str, ...]:
        """Symbols whose sizes were varied independently."""
        return tuple(n for n in self._names if n not in self._plan.sums and len({p[n] for p in self.points}) > 1)

    def fetch(self, shard: int, table: Constant, indices: str, output: str) -> None:
        """Look up rows of a table."""
        self._perform(_Step(shard=shard, inputs=(indices,), outputs=(output,), table=table))

    def run(self, shard: int, fused: Fused, plain: Fused | None = None) -> tuple[Fused, list[list[Event]]]:
        """Run a shard.

        Args:
            shard: its number.
            fused: its graph.
            plain: the same before it was fused, to fall back on where the outputs differ.

        Returns:
            The graph to use, and for each run its nodes in the order in which they ran.

        Raises:
            ExportError: the shard runs with none of the sizes that were tried.
        """
        graph = fused.model.graph
        inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
        chosen, events = self._perform(_Step(shard=shard, inputs=inputs, outputs=outputs, fused=fused), plain)
        return chosen or fused, events

    def repeat(self, shard: int, fused: Fused, like: int) -> bool:
        """Take the shapes of a shard's outputs from the shard `like`, which has the same structure.

        Returns False, having done nothing, where the inputs' shapes differ from that shard's.
        """
        graph = fused.model.graph
        inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
        if self._taken[like] != self._shapes_of(inputs):
            return False
        self._perform(_Step(shard=shard, inputs=inputs, outputs=outputs, like=like))
        return True

    @property
    def is_wide(self) -> bool:
        """Whether the extents of images were varied, of which products of a high degree are made."""
        return bool(self._plan.sizes) and not self._plan.partial

    def run_shapes(self, names: Sequence[str], run: int) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors in one of the runs."""
        return {name: self.shapes[name][run] for name in names}

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """A tensor's shape in terms of the symbols; None where it is not a sum of them in every dimension."""
        shapes = self.shapes.get(name)
        if not shapes or len({len(shape) for shape in shapes}) != 1:
            return None
        dims = [self._dim([shape[axis] for shape in shapes]) for axis in range(len(shapes[0]))]
        return tuple(dim for dim in dims if dim is not None) if None not in dims else None

    def _dim(self, sizes: Sequence[int]) -> int | str | None:
        free = self.free_symbols
        matrix = np.array([[1, *(point[name] for name in free)] for point in self.points], float)
        factors = np.rint(np.linalg.lstsq(matrix, np.array(sizes, float), rcond=None)[0]).astype(int)
        if (factors < 0).any() or (matrix @ factors != np.array(sizes)).any():
            return None
        constant, counts = int(factors[0]), factors[1:]
        parts = [name for name, count in zip(free, counts, strict=True) for _ in range(count)]
        if not parts:
            return constant
        return " + ".join([*parts, *([str(constant)] if constant else [])])

    def _begin(self, plan: _Plan, points: list[dict[str, int]]) -> None:
        self._plan = plan
        self.points = points
        self.shapes: dict[str, list[tuple[int, ...]]] = {
            name: [tuple(evaluate_dim(dim, point) for dim in spec.shape) for point in self.points]
            for name, spec in self._specs.items()
        }
        self._taken: dict[int, list[list[tuple[int, ...]]]] = {}
        self._states: list[Arrays] = [{} for _ in self.points]
        self._results: dict[int, list[list[NDArray[Any]]]] = {}

    def _perform(self, step: _Step, plain: Fused | None = None) -> tuple[Fused | None, list[list[Event]]]:
        """Do a step; if it fails, choose other sizes and do everything again."""
        try:
            chosen, events = self._do(step, plain)
        except _Refused as refused:
            found = next((plan for plan in self._plans() if self._replay(plan, step, plain)), None)
            if found is None:
                raise ExportError(
                    f"{_name(step)} does not run on sample inputs of any size that was tried, so the memory that "
                    f"it needs is not known: {refused}."
                ) from refused
            done = (self._replay(found.wider, step, plain) if found.wider else None) or self._replay(found, step, plain)
            assert done is not None
            chosen, events = done
        self._steps.append(step if chosen is None else replace(step, fused=chosen))
        return chosen, events

    def _replay(self, plan: _Plan, step: _Step, plain: Fused | None) -> tuple[Fused | None, list[list[Event]]] | None:
        """Do everything again, and the step, at other sizes; None if a shard refuses them."""
        points = plan.points(self._names)
        most = len(points)
        while len(points) * 2 > most:
            self._begin(plan, points)
            try:
                for before in self._steps:
                    self._do(before, None)
                return self._do(step, plain)
            except _Refused as refused:
                if not plan.partial:
                    return None
                points = [point for place, point in enumerate(points) if place not in refused.places]
        return None

    def _do(self, step: _Step, plain: Fused | None) -> tuple[Fused | None, list[list[Event]]]:
        chosen, events = step.fused, list[list[Event]]()
        if step.like is not None:
            results = self._results[step.like]
        else:
            inputs = [
                {name: state[name] if name in state else self._input(name, point) for name in step.inputs}
                for state, point in zip(self._states, self.points, strict=True)
            ]
            if step.table is not None:
                table = step.table.load()
                results = [[table[arrays[step.inputs[0]]]] for arrays in inputs]
            else:
                assert chosen is not None
                results, events = _run(chosen, inputs, step.outputs)
                if plain is not None and not _agree(_run(plain, inputs[:_COMPARED], step.outputs)[0], results):
                    chosen = plain
                    results, events = _run(plain, inputs, step.outputs)
        if self._plan.declared:
            self._check_declared(step.outputs, results)
        self._taken[step.shard] = self._shapes_of(step.inputs)
        for state, arrays in zip(self._states, results, strict=True):
            state.update(zip(step.outputs, arrays, strict=True))
        for place, name in enumerate(step.outputs):
            self.shapes[name] = [arrays[place].shape for arrays in results]
        if step.table is None:
            self._results[step.shard] = results
            for state in self._states:
                for name in [name for name in state if self._last_use.get(name, -1) <= step.shard]:
                    del state[name]
        return chosen, events

    def _check_declared(self, names: Sequence[str], results: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Refuse a plan under which an output's size is not the one that the graph gives it."""
        for place, name in enumerate(names):
            for point, arrays in zip(self.points, results, strict=True):
                for size, dim in zip(arrays[place].shape, self._declared.get(name, ()), strict=False):
                    if point.get(dim, size) != size:
                        raise _Refused(f"'{name}' has {size} where it should have {dim}", range(len(results)))

    def _shapes_of(self, names: Sequence[str]) -> list[list[tuple[int, ...]]]:
        return [self.shapes[name] for name in names]

    def _input(self, name: str, point: Mapping[str, int]) -> NDArray[Any]:
        spec = self._specs[name]
        shape = tuple(evaluate_dim(dim, point) for dim in spec.shape)
        random = np.random.default_rng(crc32(name.encode()))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._graph.types[name][0])
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            # Zeros and ones are rows of any table; as a mask, they leave the first position visible.
            values = random.integers(self._plan.ones, 2, shape)
            values[..., :1] = 1
            return values.astype(dtype)
        return random.standard_normal(shape).astype(dtype)

    def _plans(self) -> Iterator[_Plan]:
        """Plans to try, the likely ones first."""
        for channels, strides in self._images():
            for patches in range(1, _MOST_PATCHES + 1):
                extents = {name: stride * patches for name, stride in strides.items()}
                sizes = {
                    name: (size, size + strides[name] * 2, size + strides[name] * 3) for name, size in extents.items()
                }
                wider = _Plan(fixed=channels, sizes=sizes)
                yield _Plan(fixed={**channels, **extents}, wider=wider)
        edge = dict.fromkeys(self._names, _EDGE_SIZES)
        # A symbol that equals another is less likely than one that is the sum of two.
        for declared, parts, partial, ones in product((True, False), (2, 1), (False, True), (False, True)):
            for sums in self._relations(parts):
                yield _Plan(sums=sums, ones=ones, partial=partial, sizes=edge if partial else {}, declared=declared)

    def _relations(self, count: int) -> Iterator[dict[str, tuple[str, ...]]]:
        """None, and each symbol as the sum of so many others."""
        yield {}
        for name in self._names:
            for parts in combinations([other for other in self._names if other != name], count):
                yield {name: parts}

    def _images(self) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """For each input that a convolution takes: its channels, and the steps in which its extents may grow."""
        for node in self._graph.nodes:
            spec = self._specs.get(node.input[0]) if node.op_type == "Conv" else None
            weight = self._graph.types.get(node.input[1], (0, None))[1] if spec else None
            if spec is None or weight is None or not isinstance(weight[1], int):
                continue
            strides = attribute(node, "strides", [1] * (len(spec.shape) - 2))
            channels = weight[1] * attribute(node, "group", 1)
            extents = zip(spec.shape[2:], strides, strict=True)
            yield (
                {spec.shape[1]: channels} if isinstance(spec.shape[1], str) else {},
                {name: stride for name, stride in extents if isinstance(name, str)},
            )


def _name(step: _Step) -> str:
    return "The lookup of rows" if step.fused is None else f"Shard '{step.fused.model.graph.name}'"


class _Refused(Exception):  # noqa: N818 - not an error: it asks for other sizes
    """A shard does not run on inputs of some sizes.

    Attributes:
        places: which of the runs failed.
    """

    def __init__(self, message: str, places: Collection[int]) -> None:
        super().__init__(message)
        self.places = places


def _run(
    fused: Fused, inputs: Sequence[Arrays], outputs: Sequence[str]
) -> tuple[list[list[NDArray[Any]]], list[list[Event]]]:
    """Outputs and events for each set of inputs."""
    with TemporaryDirectory(prefix="pipeload-") as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        options.add_session_config_entry("session.disable_prepacking", "1")
        values = _add_weights(fused, Path(folder), options)
        try:
            session = ort.InferenceSession(f"{folder}/shard.onnx", options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(f"onnxruntime refuses a shard: {_first_line(error)}") from error
        results, failed = [], dict[int, str]()
        for place, arrays in enumerate(inputs):
            try:
                results.append(session.run(list(outputs), arrays))
            except Exception as error:  # noqa: BLE001 - as above
                failed[place] = _first_line(error)
        if failed:
            raise _Refused(next(iter(failed.values())), failed.keys())
        events = _events(json.loads(Path(session.end_profiling()).read_text()))
        del session, values
    return results, events


def _add_weights(fused: Fused, folder: Path, options: ort.SessionOptions) -> list[ort.OrtValue]:
    """Write the graph into the folder, and give its weights to the session; they must live as long as it does."""
    model = ModelProto()
    model.CopyFrom(fused.model)
    values = []
    for index, proto in enumerate(model.graph.initializer):
        constant = fused.external.get(proto.name)
        if constant is None:
            continue
        # The file must be there, but onnxruntime takes the values that it is given.
        model.graph.initializer[index].CopyFrom(external_initializer(proto.name, constant, "zeros.bin", 0))
        array = np.ascontiguousarray(constant.load()).reshape(constant.shape)
        if constant.dtype == TensorProto.BFLOAT16:
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), constant.dtype)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        values.append(value)
        options.add_initializer(proto.name, value)
    onnx.save(model, folder / "shard.onnx")
    with (folder / "zeros.bin").open("wb") as file:
        file.truncate(max((constant.nbytes for constant in fused.external.values()), default=0))
    return values


def _events(records: Sequence[Mapping[str, Any]]) -> list[list[Event]]:
    """A profile -> the nodes of each run, in the order in which they ran."""
    runs: list[list[Event]] = []
    current: list[Event] = []
    for record in records:
        name, details = str(record.get("name")), record.get("args", {})
        if record.get("cat") == "Node" and name.endswith("_kernel_time"):
            made = [item for entry in details.get("output_type_shape", []) for item in entry.items()]
            event = Event(
                node=int(details["node_index"]),
                output_bytes=tuple(int(np.prod(shape)) * _ITEM_BYTES.get(dtype, 8) for dtype, shape in made),
                output_shapes=tuple(tuple(shape) for _, shape in made),
            )
            current.append(event)
        elif name == "model_run":
            runs.append(current)
            current = []
    return runs


_ITEM_BYTES = {"float": 4, "double": 8, "bool": 1, "float16": 2, "bfloat16": 2} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _agree(wanted: Sequence[Sequence[NDArray[Any]]], found: Sequence[Sequence[NDArray[Any]]]) -> bool:
    """Whether as many runs as were wanted gave the same outputs."""
    pairs = zip(wanted, found, strict=False)
    return all(_equal(*pair) for one, two in pairs for pair in zip(one, two, strict=True))


def _equal(wanted: NDArray[Any], found: NDArray[Any]) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not np.issubdtype(wanted.dtype, np.floating):
        return bool(np.array_equal(wanted, found))
    finite = wanted[np.isfinite(wanted)]
    limit = _CLOSE * float(np.abs(finite).max(initial=0))
    return bool(np.allclose(wanted, found, rtol=_CLOSE, atol=limit, equal_nan=True))
