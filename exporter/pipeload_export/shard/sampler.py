"""Small runs of the shards, to learn shapes of edges and sizes of intermediate tensors, which graphs do not state.

The shards run one after another on seeded inputs, at several sizes of each symbolic dimension. A shard that is built
like an earlier one does not run again: its outputs have the shapes that the earlier one's had. So a model costs about
as much as one block, however many blocks it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.format.dims import MOST_PARTS
from pipeload.format.manifest import TensorSpec, evaluate_dim
from pipeload.machine.sizes import format_bytes
from pipeload_export.graph.graph import Constant, Graph, storage_dtype
from pipeload_export.shard.alignment import Sums
from pipeload_export.shard.fuse import Fused
from pipeload_export.shard.published import Published
from pipeload_export.shard.sample_sizes import Plan, plans, symbols_of, traced
from pipeload_export.shard.trial import Arrays, Event, Refused, Trial, agree, run_trial

__all__ = ["Sampler"]

_DRAWN_BYTES, _MOST_INPUT_BYTES = 8, 1 << 30
"""Of a number while inputs are drawn, and of one input; larger ones are refused, as sizes that no input has."""
_COMPARED = 3
"""Runs in which a fused graph is compared with the graph that it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A lookup or run for a shard, kept so that it can be repeated at other sizes."""

    shard: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused: Fused | None = None
    table: Constant | None = None
    like: int | None = None


_Done = tuple[Fused | None, list[list[Event]]]
"""The graph that was run, if any, and its nodes in each run."""


class _Trials:
    """Sessions of shards, each made when it is first wanted."""

    def __init__(self, stack: ExitStack, work: Path) -> None:
        self._stack = stack
        self._work = work
        self._made: dict[int, Trial] = {}

    def of(self, fused: Fused) -> Trial:
        if id(fused) not in self._made:
            self._made[id(fused)] = self._stack.enter_context(Trial(fused, self._work))
        return self._made[id(fused)]


class Sampler:
    """Runs the shards of one model in order.

    Args:
        graph: the model's.
        specs: the graph's inputs.
        last_use: tensor -> number of the last shard that takes it.
        work: a folder for temporary files.
        published: sizes that the model's files name.

    Attributes:
        points: sizes of all symbols, for each run.
        shapes: tensor -> its shape in each of the runs.
    """

    def __init__(
        self,
        graph: Graph,
        specs: Sequence[TensorSpec],
        last_use: Mapping[str, int],
        work: Path,
        published: Published | None = None,
    ) -> None:
        self._graph = graph
        self._specs = {spec.name: spec for spec in specs}
        self._last_use = last_use
        self._work = work
        self._names = symbols_of(specs)
        self._declared = {v.name: [dim.dim_param for dim in v.type.tensor_type.shape.dim] for v in graph.outputs}
        self._steps: list[_Step] = []
        self._published = published or Published()
        plan = next(self._plans())
        self._begin(plan, plan.points(self._names))

    @property
    def free_symbols(self) -> tuple[str, ...]:
        """Symbols whose sizes were varied independently."""
        return tuple(n for n in self._names if n not in self._plan.sums and len({p[n] for p in self.points}) > 1)

    @property
    def fixed(self) -> Mapping[str, int]:
        """Symbols that have one size, the only one of which something is known."""
        return self._plan.fixed

    @property
    def sums(self) -> Sums:
        """Symbols whose sizes follow from those of others."""
        return self._plan.sums

    def fetch(self, shard: int, table: Constant, indices: str, output: str) -> None:
        """Look up rows of a table."""
        self._perform(_Step(shard=shard, inputs=(indices,), outputs=(output,), table=table))

    def run(self, shard: int, fused: Fused, plain: Fused | None = None) -> tuple[Fused, list[list[Event]]]:
        """Run a shard.

        Args:
            shard: its number.
            fused: its graph.
            plain: the same before it was fused, to fall back on where that does not run, or its outputs differ.

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

        Returns False, and does nothing, where the inputs' shapes differ from that shard's.
        """
        graph = fused.model.graph
        inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
        if self._taken[like] != self._shapes_of(inputs):
            return False
        self._perform(_Step(shard=shard, inputs=inputs, outputs=outputs, like=like))
        return True

    @property
    def steps(self) -> Mapping[str, int]:
        """Of symbols whose sizes come in steps, such as those of images: the step."""
        return self._plan.steps

    def run_shapes(self, names: Sequence[str], run: int) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors in one of the runs."""
        return {name: self.shapes[name][run] for name in names}

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """A tensor's shape in terms of the symbols; None where it is not a short sum of them in every dimension."""
        shapes = self.shapes.get(name)
        if not shapes or len({len(shape) for shape in shapes}) != 1:
            return None
        dims = [self._dim([shape[axis] for shape in shapes]) for axis in range(len(shapes[0]))]
        return tuple(dim for dim in dims if dim is not None) if None not in dims else None

    def _dim(self, sizes: Sequence[int]) -> int | str | None:
        free = self.free_symbols
        matrix = np.array([[1, *(point[name] for name in free)] for point in self.points], float)
        factors = np.rint(np.linalg.lstsq(matrix, np.array(sizes, float), rcond=None)[0]).astype(int)
        constant, counts = int(factors[0]), factors[1:]
        is_long = counts.sum() + bool(constant) > MOST_PARTS
        if is_long or (factors < 0).any() or (matrix @ factors != np.array(sizes)).any():
            return None
        parts = [name for name, count in zip(free, counts, strict=True) for _ in range(count)]
        if not parts:
            return constant
        return " + ".join([*parts, *([str(constant)] if constant else [])])

    def _plans(self) -> Iterator[Plan]:
        return plans(self._graph, list(self._specs.values()), self._published)

    def _begin(self, plan: Plan, points: list[dict[str, int]]) -> None:
        self._plan = plan
        self.points = points
        self.shapes: dict[str, list[tuple[int, ...]]] = {
            name: [tuple(evaluate_dim(dim, point) for dim in spec.shape) for point in self.points]
            for name, spec in self._specs.items()
        }
        self._taken: dict[int, list[list[tuple[int, ...]]]] = {}
        self._states: list[Arrays] = [{} for _ in self.points]
        self._results: dict[int, list[list[NDArray[Any]]]] = {}

    def _perform(self, step: _Step, plain: Fused | None = None) -> _Done:
        """Do a step; if it fails, choose other sizes and repeat all steps."""
        try:
            chosen, events = self._do(step, plain)
        except Refused as refused:
            # Sessions take seconds to make for graphs of thousands of nodes, and one serves all plans.
            with ExitStack() as stack:
                trials = _Trials(stack, self._work)
                found = next((plan for plan in self._plans() if self._replay(plan, step, plain, trials)), None)
                self._check_frozen(found, step, plain, trials)
            done = self._replay(found, step, plain) if found else None
            if done is None:
                raise ExportError(
                    f"{_name(step)} does not run on sample inputs of any size that was tried, so the memory that "
                    f"it needs is not known: {refused}."
                ) from refused
            chosen, events = done
        self._steps.append(step if chosen is None else replace(step, fused=chosen))
        return chosen, events

    def _check_frozen(self, found: Plan | None, step: _Step, plain: Fused | None, trials: _Trials) -> None:
        """Where no plan was found, look whether the graph runs at the sizes of its tracing, and say so."""
        plan = traced(self._graph, list(self._specs.values()), self._published)
        if found is None and self._replay(plan, step, plain, trials):
            sizes = " and ".join(f"{name} {size}" for name, size in plan.fixed.items())
            raise ExportError(
                f"{_name(step)} runs with {sizes}, the sizes at which it was traced, and not with smaller and larger "
                "ones: tracing froze a decision of the model's code. Export it to an .onnx file whose sizes are fixed "
                "to those that you need, and pass that."
            )

    def _replay(self, plan: Plan, step: _Step, plain: Fused | None, trials: _Trials | None = None) -> _Done | None:
        """Repeat all steps at other sizes, then do this one; None if a shard refuses them.

        With `trials` it is only found out whether they all run.
        """
        points = plan.points(self._names)
        most = len(points)
        while len(points) * 2 > most:
            try:
                # Nearly every plan that is refused is so at its smallest sizes or at its largest.
                for end in (points[:1], points[-1:]) if trials and not plan.partial else ():
                    self._run_all(plan, end, step, plain, trials)
                return self._run_all(plan, points, step, plain, trials)
            except Refused as refused:
                if not plan.partial:
                    return None
                points = [point for place, point in enumerate(points) if place not in refused.places]
        return None

    def _run_all(
        self, plan: Plan, points: list[dict[str, int]], step: _Step, plain: Fused | None, trials: _Trials | None
    ) -> _Done:
        """All steps, then this one, at these sizes."""
        self._begin(plan, points)
        for before in self._steps:
            self._do(before, None, trials)
        return self._do(step, plain, trials)

    def _do(self, step: _Step, plain: Fused | None, trials: _Trials | None = None) -> _Done:
        chosen, events = step.fused, list[list[Event]]()
        if step.like is not None:
            results = self._results[step.like]
        else:
            inputs = [
                {name: state[name] if name in state else self._input(name, point) for name in step.inputs}
                for state, point in zip(self._states, self.points, strict=True)
            ]
            if step.table is not None:
                table, dtype = step.table.load(), storage_dtype(step.table.dtype)
                try:
                    results = [[np.asarray(table[arrays[step.inputs[0]]], dtype)] for arrays in inputs]
                except IndexError as error:
                    raise Refused(str(error), range(len(inputs))) from error
            else:
                assert chosen is not None
                if trials:
                    results = trials.of(plain or chosen).run(inputs, step.outputs, stops=not self._plan.partial)
                else:
                    chosen, results, events = self._try(chosen, plain, inputs, step.outputs)
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

    def _is_like(
        self, plain: Fused, inputs: Sequence[Arrays], outputs: Sequence[str], found: Sequence[Sequence[NDArray[Any]]]
    ) -> bool:
        """Whether a graph gives the same outputs before it was fused.

        Where rounding is coarse, onnxruntime's own optimisation changes answers; then like is compared with like.
        """
        return any(
            agree(run_trial(plain, inputs[:_COMPARED], outputs, self._work, optimised=optimised)[0], found)
            for optimised in (False, True)
        )

    def _try(
        self, fused: Fused, plain: Fused | None, inputs: Sequence[Arrays], outputs: Sequence[str]
    ) -> tuple[Fused, list[list[NDArray[Any]]], list[list[Event]]]:
        """Run the fused graph; where it does not run, or has other outputs than the plain one, run that."""
        few = not self._plan.partial
        try:
            results, events = run_trial(fused, inputs, outputs, self._work, stops=few)
            if plain is None or self._is_like(plain, inputs, outputs, results):
                return fused, results, events
        except Refused:
            if plain is None:
                raise
        return plain, *run_trial(plain, inputs, outputs, self._work, stops=few)

    def _check_declared(self, names: Sequence[str], results: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Refuse a plan under which an output's size is not the one that the graph gives it."""
        for place, name in enumerate(names):
            for point, arrays in zip(self.points, results, strict=True):
                for size, dim in zip(arrays[place].shape, self._declared.get(name, ()), strict=False):
                    if point.get(dim, size) != size:
                        raise Refused(f"'{name}' has {size} where it should have {dim}", range(len(results)))

    def _shapes_of(self, names: Sequence[str]) -> list[list[tuple[int, ...]]]:
        return [self.shapes[name] for name in names]

    def _input(self, name: str, point: dict[str, int]) -> NDArray[Any]:
        spec = self._specs[name]
        shape = tuple(evaluate_dim(dim, point) for dim in spec.shape)
        if (nbytes := prod(shape) * _DRAWN_BYTES) > _MOST_INPUT_BYTES:
            raise Refused(f"'{name}' would have {format_bytes(nbytes)} with {point}", [self.points.index(point)])
        random = np.random.default_rng(crc32(name.encode()))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._graph.types[name][0])
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            # Zeros and ones are rows of any table; as a mask, they leave the first position visible.
            values = np.asarray(random.integers(self._plan.ones, 2, shape))
            values[(..., slice(1)) if shape else ...] = 1
            if (end := self._plan.ends.get(name)) is not None:
                values[values == end] = end - 1 if end else 1
                values[..., -1:] = end
            return values.astype(dtype)
        return random.standard_normal(shape).astype(dtype)


def _name(step: _Step) -> str:
    return "The lookup of rows" if step.fused is None else f"Shard '{step.fused.model.graph.name}'"
