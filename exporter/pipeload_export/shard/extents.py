"""How images and sounds shrink on their way through a graph: which of their sizes make whole patches or frames.

A convolution or pool of kernel k, stride s and padding p makes m positions of s * m + (k - s - p) given ones. A chain
of them makes `step` * m + `rest`. Where branches meet, the one with the smaller step goes on: attention over fewer
keys, for example, has the queries' positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from pipeload.format.manifest import TensorSpec
from pipeload_export.graph.graph import attribute

__all__ = ["Extent", "find_extents"]

_POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
_LARGEST_ROUNDED_WINDOW = 64
"""Pixels along the edge of a pool that rounds up; a larger one stands for all that is left of an image."""
_KEEPS_NOTHING = frozenset({"ConstantOfShape", "Range", "Shape", "Size"})


@dataclass(frozen=True, slots=True)
class Extent:
    """An extent of an input that makes m positions, for any m: `step` * m + `rest`."""

    step: int = 1
    rest: int = 0

    def size(self, count: int) -> int:
        """An extent that makes that many positions, in whole steps where windows are padded."""
        return self.step * count + max(self.rest, 0)

    def shrunk(self, kernel: int, stride: int, padding: int) -> Extent:
        """The same before a convolution of this kind."""
        return Extent(self.step * stride, self.step * (kernel - stride - padding) + self.rest)


def find_extents(
    nodes: Iterable[NodeProto], specs: Sequence[TensorSpec], shape_of: Callable[[str], Sequence[object] | None]
) -> dict[tuple[str, int], Extent]:
    """The extents of inputs that convolutions take.

    Args:
        nodes: the graph's, each after those that make its inputs.
        specs: the graph's inputs.
        shape_of: a constant's name -> its shape, if that is known.

    Returns:
        (input, dimension) -> the longest step to which it shrinks.
    """
    inputs = {spec.name: len(spec.shape) for spec in specs if spec.dtype.startswith(("float", "uint8"))}
    flows: dict[str, tuple[str, tuple[Extent, ...]]] = {name: (name, ()) for name in inputs}
    found: dict[str, tuple[Extent, ...]] = {}
    for node in nodes:
        if node.op_type in _KEEPS_NOTHING:
            continue
        taken = [flows[name] for name in node.input if name in flows]
        if not taken:
            continue
        source, extents = min(taken, key=lambda flow: [extent.step for extent in flow[1]])
        windows = _windows(node, shape_of)
        if windows:
            extents = tuple(
                extent.shrunk(*window)
                for extent, window in zip(extents or (Extent(),) * len(windows), windows, strict=False)
            )
            before = found.get(source, (Extent(0),) * len(extents))
            if len(before) == len(extents) < inputs[source]:
                found[source] = tuple(max(pair, key=lambda e: e.step) for pair in zip(before, extents, strict=True))
        flows.update(dict.fromkeys(filter(None, node.output), (source, extents)))
    return {
        (name, inputs[name] - len(extents) + place): extent
        for name, extents in found.items()
        for place, extent in enumerate(extents)
    }


def _windows(node: NodeProto, shape_of: Callable[[str], Sequence[object] | None]) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding in each dimension that the node moves a window over."""
    is_convolution = "Conv" in node.op_type and node.op_type != "ConvTranspose"
    if not is_convolution and node.op_type not in _POOLS:
        return []
    kernel = attribute(node, "kernel_shape")
    if kernel is None:
        weight = node.input[3 if node.op_type == "QLinearConv" else 1]
        kernel = [size for size in (shape_of(weight) or ())[2:] if isinstance(size, int)]
    if attribute(node, "ceil_mode", 0) and max(kernel, default=0) > _LARGEST_ROUNDED_WINDOW:
        # It rounds up to one window over whatever there is (EfficientNet's has 1280 x 1280 pixels).
        return []
    strides = attribute(node, "strides", [1] * len(kernel))
    dilations = attribute(node, "dilations", [1] * len(kernel))
    pads = attribute(node, "pads", [0] * 2 * len(kernel))
    return [
        ((size - 1) * dilations[i] + 1, strides[i], pads[i] + pads[i + len(kernel)]) for i, size in enumerate(kernel)
    ]
