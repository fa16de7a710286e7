"""Seeded inputs that suit a model, found from its manifest and its graphs.

The use of an input tells its meaning, so that a graph with names of its own gets sensible inputs too:

- an integer input that selects rows of a table is drawn below the number of rows;
- any other integer input is a mask: ones, with zeros where a shorter text is padded;
- positions cannot be told from masks by use, so there the name decides: it has "position" in it;
- caches are those of the manifest; inputs of four dimensions are images, as large as the processor makes them, and as
  the config says;
- a float input that convolutions take is as long as several of their frames;
- an id that the graph looks for, as for the end of a text, stands at the end of each text, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.casts import without_casts
from pipeload.format.manifest import Manifest, TensorSpec, evaluate_dim, symbols
from pipeload_export.shard.published import Published, read_published
from pipeload_export.source.folder import read_json

if TYPE_CHECKING:
    from onnx import GraphProto

    from pipeload_export.shard.extents import Extent

__all__ = ["ENCODER", "Case", "Sizes", "as_taken", "end_texts", "index_limits", "sample_cases"]

Arrays = dict[str, NDArray[Any]]

_SEED = 20240904
_MANY = 1 << 30
_IMAGE = (224, 224)
"""Of a model that does not say how large its images are."""
_LARGE_PIXELS = 512 * 512
"""Larger images are tried alone: attention over several of them would take gigabytes."""
_LEAST_FRAMES = 4
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
class Sizes:
    """The sizes of one set of inputs, the side on which a shorter text is padded, and half a frame more of a sound."""

    batch: int
    length: int
    past: int = 0
    padding: str = ""
    image: tuple[int, int] | None = None
    uneven: bool = False

    @property
    def name(self) -> str:
        """The sizes and the padding, for messages."""
        if self.image:
            text = f"{replace(self, image=None).name} with " if self.length else ""
            return f"{text}{self.batch} x {self.image[0]} x {self.image[1]} pixels"
        past = f" after {self.past}" if self.past else ""
        more = " and half a frame" if self.uneven else ""
        return f"{self.batch} x {self.length}{more}{past}{f', padded {self.padding}' if self.padding else ''}"


ENCODER = (
    Sizes(batch=1, length=1),
    Sizes(batch=1, length=7),
    Sizes(batch=2, length=16, padding="right"),
    Sizes(batch=3, length=9, padding="left"),
)
_DECODER = (
    Sizes(batch=1, length=6),
    Sizes(batch=2, length=9, padding="left"),
    Sizes(batch=1, length=1, past=7),
    Sizes(batch=2, length=1, past=8, padding="left"),
    Sizes(batch=2, length=3, past=4, padding="right"),
)


def sample_cases(manifest: Manifest, directory: Path) -> list[Case]:
    """Inputs of several lengths and batch sizes; for a decoder, first without and then with a filled cache.

    With caches of int8 there is one more, the first, whose own caches fill those of all others (`compare`).
    """
    graphs = _graphs(manifest, directory)
    limits = _limits(manifest, graphs)
    config = read_json(directory / "config.json")
    published = read_published(config, read_json(directory / "preprocessor_config.json"))
    extents, ends = _from_graphs(manifest, graphs)
    roles = _Roles(manifest, limits, published, extents)
    positions = config.get("max_position_embeddings") or config.get("n_positions") or _MANY
    # Some model types use the first two positions for padding.
    known = _DECODER if manifest.caches else ENCODER
    chosen = [sizes for sizes in known if sizes.past + sizes.length <= positions - 2] or [known[0]]
    if any(cache.scale for cache in manifest.caches):
        batch, past = (max(getattr(sizes, name) for sizes in chosen) for name in ("batch", "past"))
        chosen = [Sizes(batch=batch, length=max(past, 1)), *chosen]
    if roles.has_sounds:
        # Models fill up or cut what makes no whole frame.
        chosen += [Sizes(batch=1, length=length, uneven=True) for length in (7, 8) if length <= positions - 2]
    if roles.has_images:
        if not limits:
            chosen = [Sizes(batch=batch, length=0) for batch in (1, 2, 3)]
        images = [roles.fitted(image) for image in published.images or (_IMAGE,)]
        chosen = _with_images(chosen, list(dict.fromkeys(images)))
    # A generator for each case: the values of one case do not depend on the others.
    return [
        Case(
            name=sizes.name,
            inputs=_inputs(manifest, roles, limits, ends, sizes, np.random.default_rng([_SEED, number])),
        )
        for number, sizes in enumerate(chosen)
    ]


def _with_images(chosen: Sequence[Sizes], images: Sequence[tuple[int, int]]) -> list[Sizes]:
    """Every case with images of the first size, as the processor makes them, and the first case with each other one."""
    first, *others = images
    large = first[0] * first[1] > _LARGE_PIXELS
    return [
        *(replace(sizes, image=first, batch=1 if large else sizes.batch) for sizes in chosen),
        *(replace(chosen[0], image=image) for image in others),
    ]


def _graphs(manifest: Manifest, directory: Path) -> list[GraphProto]:
    """The graphs of the shards, in order, without their weights, and as if these were stored in 32 bits."""
    import onnx  # needs the extra [export], which importing this module does not

    files = ((shard, (directory / shard.graph.path).read_bytes()) for shard in manifest.shards)
    return [onnx.load_model_from_string(without_casts(shard, data) or data).graph for shard, data in files]


def _from_graphs(
    manifest: Manifest, graphs: Sequence[GraphProto]
) -> tuple[dict[tuple[str, int], Extent], dict[str, int]]:
    """The extents of inputs that convolutions take, and the ids that are looked for in inputs."""
    from onnx import TensorProto

    from pipeload_export.shard.extents import find_extents
    from pipeload_export.shard.sample_sizes import sought_ids

    nodes = [node for graph in graphs for node in graph.node]
    shapes = {proto.name: tuple(proto.dims) for graph in graphs for proto in graph.initializer}
    small = {
        proto.name: proto
        for graph in graphs
        for proto in graph.initializer
        if proto.data_location != TensorProto.EXTERNAL
    }
    names = {spec.name for spec in manifest.inputs}
    return find_extents(nodes, manifest.inputs, shapes.get), sought_ids(nodes, names, small)


class _Roles:
    """The meaning of each symbolic dimension of the graph's inputs."""

    def __init__(
        self,
        manifest: Manifest,
        limits: Mapping[str, int],
        published: Published,
        extents: Mapping[tuple[str, int], Extent],
    ) -> None:
        caches = {cache.input for cache in manifest.caches}
        self.caches = caches
        self._edges: dict[str, int] = {}
        self._one_size: dict[int, int] = {}
        self._channels: dict[str, int] = {}
        self._extents: dict[str, Extent] = {}
        self._batch: set[str] = set()
        self._past: set[str] = set()
        self._text: set[str] = set()
        for spec in manifest.inputs:
            first, *others = [set(symbols(dim)) for dim in spec.shape] or [set()]
            self._batch |= first
            if spec.name in caches:
                self._past |= set().union(*others)
            elif len(spec.shape) == 4:
                _, channels, *edges = spec.shape
                if isinstance(channels, str):
                    self._channels[channels] = published.channels or 3
                self._edges |= {dim: place for place, dim in enumerate(edges) if isinstance(dim, str)}
                if any(name == spec.name for name, _ in extents):
                    self._one_size |= {place: dim for place, dim in enumerate(edges) if isinstance(dim, int)}
            elif spec.name in limits:
                self._text |= set().union(*others)
            for (name, axis), extent in extents.items():
                dim = spec.shape[axis] if name == spec.name else None
                if isinstance(dim, str) and dim not in self._edges:
                    self._extents[dim] = extent
        self._past -= self._text

    @property
    def has_images(self) -> bool:
        """Whether the model takes images."""
        return bool(self._edges or self._one_size)

    @property
    def has_sounds(self) -> bool:
        """Whether convolutions take something else than images, of a free length, in steps."""
        return any(extent.step > 1 for extent in self._extents.values())

    def fitted(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image, with the size that the model takes where an edge has one only."""
        return self._one_size.get(0, image[0]), self._one_size.get(1, image[1])

    def dims(self, spec: TensorSpec, sizes: Sizes) -> tuple[int, ...]:
        """The input's shape in a case."""
        return tuple(evaluate_dim(dim, {s: self._size(s, sizes) for s in symbols(dim)}) for dim in spec.shape)

    def _size(self, symbol: str, sizes: Sizes) -> int:
        if symbol in self._edges and sizes.image:
            return sizes.image[self._edges[symbol]]
        if symbol in self._channels:
            return self._channels[symbol]
        if symbol in self._extents:
            extent = self._extents[symbol]
            return extent.size(sizes.length + _LEAST_FRAMES) + (extent.step // 2 if sizes.uneven else 0)
        if symbol in self._batch:
            return sizes.batch
        if symbol in self._past:
            return sizes.past
        # In a decoder, a length that no text has is that of cache and text together, as a mask has it.
        return sizes.length if symbol in self._text or not self.caches else sizes.past + sizes.length


def _inputs(
    manifest: Manifest,
    roles: _Roles,
    limits: Mapping[str, int],
    ends: Mapping[str, int],
    sizes: Sizes,
    random: np.random.Generator,
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
            if spec.name == "bbox":
                # Left, top, right and bottom of a word: none ends before it begins.
                corners = values[..., :2], values[..., 2:]
                values = np.concatenate([np.minimum(*corners), np.maximum(*corners)], axis=-1)
            if (end := ends.get(spec.name)) is not None and 0 <= end < limit:
                end_texts(values, _mask(shape, sizes), end, (end + 1) % limit)
        elif len(shape) == 4:
            values = random.integers(0, 256, shape)
        else:
            values = _mask(shape, sizes)
        # Not ascontiguousarray, which makes a number an array of one.
        inputs[spec.name] = np.asarray(values, dtype, order="C")
    return inputs


def end_texts(ids: NDArray[Any], mask: NDArray[Any], end: int, other: int) -> None:
    """Let each text end with an id, and have it nowhere else.

    Args:
        ids: the texts, `[..., length]`; they are changed.
        mask: ones where they are, zeros where they are padded.
        end: the id.
        other: what stands in its place elsewhere.
    """
    ids[ids == end] = other
    last = ids.shape[-1] - 1 - mask[..., ::-1].argmax(axis=-1)
    np.put_along_axis(ids, last[..., None], end, axis=-1)


def _mask(shape: tuple[int, ...], sizes: Sizes) -> NDArray[Any]:
    mask = np.ones(shape)
    if sizes.padding and len(shape) >= 2 and shape[-1] > 3:
        # The last text of the batch is shorter by three.
        mask[(-1, ..., slice(-3, None) if sizes.padding == "right" else slice(3))] = 0
    return mask


def index_limits(manifest: Manifest, directory: Path) -> dict[str, int]:
    """For each integer graph input that selects rows of tables: the number of rows of the smallest such table."""
    return _limits(manifest, _graphs(manifest, directory))


def _limits(manifest: Manifest, graphs: Sequence[GraphProto]) -> dict[str, int]:
    makers: dict[str, list[str]] = {}
    uses = [(lookup.indices, lookup.table.shape[0]) for shard in manifest.shards for lookup in shard.lookups]
    for graph in graphs:
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


def as_taken(manifest: Manifest, made: Mapping[str, NDArray[Any]]) -> Arrays:
    """An array for each graph input that is no cache, as the graph takes it, out of arrays by name."""
    return {spec.name: np.ascontiguousarray(made[spec.name].astype(spec.dtype)) for spec in manifest.free_inputs}
