"""Seeded inputs that suit a model, found from its manifest and its graphs.

The use of an input tells its meaning, so that a graph with names of its own gets sensible inputs too:

- an integer input that selects rows of a table is drawn below the number of rows;
- any other integer input is a mask: ones, with zeros where a shorter text is padded;
- positions cannot be told from masks by use, so there the name decides: it has "position" in it;
- caches are those of the manifest; float inputs of four dimensions are images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import Manifest, TensorSpec, evaluate_dim, symbols
from pipeload_export.source.folder import read_json

__all__ = ["Case", "index_limits", "sample_cases"]

Arrays = dict[str, NDArray[Any]]

_SEED = 20240904
_MANY = 1 << 30
_KEEPS_VALUES = {
    *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze", "Where"),
}
"""Operators that pass integers on unchanged, so that an index may come through them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of inputs.

    Attributes:
        name: its sizes and padding, for messages.
        inputs: an array for each graph input.
    """

    name: str
    inputs: Arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    batch: int
    length: int
    past: int = 0
    padding: str = ""

    @property
    def name(self) -> str:
        past = f" after {self.past}" if self.past else ""
        return f"{self.batch} x {self.length}{past}{f', padded {self.padding}' if self.padding else ''}"


_ENCODER = (
    _Sizes(batch=1, length=1),
    _Sizes(batch=1, length=7),
    _Sizes(batch=2, length=16, padding="right"),
    _Sizes(batch=3, length=9, padding="left"),
)
_DECODER = (
    _Sizes(batch=1, length=6),
    _Sizes(batch=2, length=9, padding="left"),
    _Sizes(batch=1, length=1, past=7),
    _Sizes(batch=2, length=1, past=8, padding="left"),
    _Sizes(batch=2, length=3, past=4, padding="right"),
)


def sample_cases(manifest: Manifest, directory: Path) -> list[Case]:
    """Inputs of several lengths and batch sizes; for a decoder, first without and then with a filled cache.

    With caches of int8 there is one more, the first, whose own caches fill those of all others (`compare`).
    """
    limits = index_limits(manifest, directory)
    config = read_json(directory / "config.json")
    roles = _Roles(manifest, limits, config)
    positions = config.get("max_position_embeddings") or config.get("n_positions") or _MANY
    # Some model types use the first two positions for padding.
    known = _DECODER if manifest.caches else _ENCODER
    chosen = [sizes for sizes in known if sizes.past + sizes.length <= positions - 2] or [known[0]]
    if any(cache.scale for cache in manifest.caches):
        batch, past = (max(getattr(sizes, name) for sizes in chosen) for name in ("batch", "past"))
        chosen = [_Sizes(batch=batch, length=max(past, 1)), *chosen]
    # A generator for each case: the values of one case do not depend on the others.
    return [
        Case(name=sizes.name, inputs=_inputs(manifest, roles, limits, sizes, np.random.default_rng([_SEED, number])))
        for number, sizes in enumerate(chosen)
    ]


class _Roles:
    """The meaning of each symbolic dimension of the graph's inputs."""

    def __init__(self, manifest: Manifest, limits: Mapping[str, int], config: Mapping[str, Any]) -> None:
        caches = {cache.input for cache in manifest.caches}
        self.caches = caches
        self._fixed: dict[str, int] = {}
        self._batch: set[str] = set()
        self._past: set[str] = set()
        self._text: set[str] = set()
        for spec in manifest.inputs:
            first, *others = [set(symbols(dim)) for dim in spec.shape] or [set()]
            self._batch |= first
            if spec.name in caches:
                self._past |= set().union(*others)
            elif len(spec.shape) == 4:
                self._add_image(spec, config)
            elif spec.name in limits:
                self._text |= set().union(*others)
        self._past -= self._text

    def _add_image(self, spec: TensorSpec, config: Mapping[str, Any]) -> None:
        size = config.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        for dim, known in zip(spec.shape[1:], (config.get("num_channels", 3), height, width), strict=True):
            if isinstance(dim, str):
                self._fixed[dim] = known

    def dims(self, spec: TensorSpec, sizes: _Sizes) -> tuple[int, ...]:
        """The input's shape in a case."""
        return tuple(evaluate_dim(dim, {s: self._size(s, sizes) for s in symbols(dim)}) for dim in spec.shape)

    def _size(self, symbol: str, sizes: _Sizes) -> int:
        if symbol in self._fixed:
            return self._fixed[symbol]
        if symbol in self._batch:
            return sizes.batch
        if symbol in self._past:
            return sizes.past
        # In a decoder, a length that no text has is that of cache and text together, as a mask has it.
        return sizes.length if symbol in self._text or not self.caches else sizes.past + sizes.length


def _inputs(
    manifest: Manifest, roles: _Roles, limits: Mapping[str, int], sizes: _Sizes, random: np.random.Generator
) -> Arrays:
    inputs: Arrays = {}
    for spec in manifest.inputs:
        shape, dtype, limit = roles.dims(spec, sizes), np.dtype(spec.dtype), limits.get(spec.name)
        if dtype.kind == "f":
            values: NDArray[Any] = random.standard_normal(shape)
        elif "position" in spec.name:
            values = np.broadcast_to(sizes.past + np.arange(shape[-1]), shape) % (limit or _MANY)
        elif limit is not None:
            values = random.integers(0, limit, shape)
        elif len(shape) == 4:
            values = random.integers(0, 256, shape)
        else:
            values = _mask(shape, sizes)
        inputs[spec.name] = np.ascontiguousarray(values.astype(dtype))
    return inputs


def _mask(shape: tuple[int, ...], sizes: _Sizes) -> NDArray[Any]:
    mask = np.ones(shape)
    if sizes.padding and len(shape) >= 2 and shape[-1] > 3:
        # The last text of the batch is shorter by three.
        mask[(-1, ..., slice(-3, None) if sizes.padding == "right" else slice(3))] = 0
    return mask


def index_limits(manifest: Manifest, directory: Path) -> dict[str, int]:
    """For each integer graph input that selects rows of tables: the number of rows of the smallest such table."""
    import onnx  # needs the extra [export], which importing this module does not

    makers: dict[str, list[str]] = {}
    uses = [(lookup.indices, lookup.table.shape[0]) for shard in manifest.shards for lookup in shard.lookups]
    for shard in manifest.shards:
        graph = onnx.load(directory / shard.graph.path, load_external_data=False).graph
        rows = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type in _KEEPS_VALUES:
                sources = list(node.input[1:] if node.op_type == "Where" else node.input)
                makers.update(dict.fromkeys(node.output, sources))
            if node.op_type == "Gather" and rows.get(node.input[0]):
                axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
                uses.append((node.input[1], rows[node.input[0]][axis]))
    integers = {spec.name for spec in manifest.inputs if np.dtype(spec.dtype).kind in "iu"}
    limits: dict[str, int] = {}
    for name, limit in uses:
        seen, waiting = set(), [name]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in integers:
                limits[name] = min(limit, limits.get(name, limit))
            waiting += makers.get(name, [])
    return limits
