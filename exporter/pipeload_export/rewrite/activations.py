"""What products with blocks of few bits take of their activations, beside or in place of the activations themselves.

*Halves.* A packed MatMulNBits rounds activations to 8 bits in each block. Halves are two rows in the place of one: what
such rounding makes of the row, and what it takes away. The kernel takes the first as it is and rounds the second, whose
numbers are 254 times as small; the product is the sum of both. The weights are read once for the two rows: a product
with a single token takes 1.0 to 1.3 times as long, and with the kernel that computes with floats 3 times as long.

```
x [..., K] -> halves [..., 2, K] -MatMulNBits-> [..., 2, N] -ReduceSum-> [..., N]
```

*Sums* of blocks, `[..., K / block_size]`, are multiplied with the minima of the blocks of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from pipeload_export.graph.graph import Constant, known_constant

__all__ = ["Activations", "Halved", "halved"]

_HIGHEST = 127
"""Of the numbers to which the kernel rounds a block."""
_LEAST = 1e-30
"""The largest size of a block of zeros is taken for this."""
_REDUCES_BY_INPUT = 18
"""The first opset in which ReduceMax has its axes as an input."""


class Activations:
    """Makes halves and sums of tensors, once for all products that take them.

    Args:
        opset: of the graph.

    Attributes:
        constants: those that the nodes take.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._known: set[str] = set()
        self._nodes: list[NodeProto] = []
        self.constants: dict[str, Constant] = {}

    def take(self) -> list[NodeProto]:
        """The nodes that were made since the last time, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def halves(self, given: str, rank: int, block_size: int) -> str:
        """The halves of a tensor of `rank` dimensions, the last of which is a multiple of the block's size."""
        output = f"{given}.halves_of_{block_size}"
        if output not in self._known:
            blocks = self._blocks(given, rank, block_size)
            largest = self._largest(self._op("Abs", [blocks], f"{output}.sizes"), f"{output}.largest")
            largest = self._op("Max", [largest, self._number(_LEAST)], f"{output}.above_zero")
            step = self._op("Div", [largest, self._number(_HIGHEST)], f"{output}.step")
            steps = self._op("Round", [self._op("Div", [blocks, step], f"{output}.in_steps")], f"{output}.steps")
            rounded = self._op("Mul", [steps, step], f"{output}.rounded")
            row = self._numbers(*[0] * (rank - 1), 1, -1)
            first, whole = (self._op("Reshape", [name, row], f"{name}.{block_size}.row") for name in (rounded, given))
            rest = self._op("Sub", [whole, first], f"{output}.rest")
            self._op("Concat", [first, rest], output, axis=-2)
        return output

    def sums(self, given: str, rank: int, block_size: int) -> str:
        """The sums of the blocks of a tensor's last axis."""
        output = f"{given}.sums_of_{block_size}"
        if output not in self._known:
            self._op("ReduceSum", [self._blocks(given, rank, block_size), self._numbers(-1)], output, keepdims=0)
        return output

    def joined(self, made: str, output: str) -> str:
        """The product with a tensor, of that with its halves."""
        return self._op("ReduceSum", [made, self._numbers(-2)], output, keepdims=0)

    def _blocks(self, given: str, rank: int, block_size: int) -> str:
        sizes = self._numbers(*[0] * (rank - 1), -1, block_size)
        return self._op("Reshape", [given, sizes], f"{given}.blocks_of_{block_size}")

    def _largest(self, given: str, output: str) -> str:
        if self._opset < _REDUCES_BY_INPUT:
            return self._op("ReduceMax", [given], output, keepdims=1, axes=[-1])
        return self._op("ReduceMax", [given, self._numbers(-1)], output, keepdims=1)

    def _op(self, kind: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        if output not in self._known:
            self._known.add(output)
            self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _numbers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: NDArray[Any]) -> str:
        name = f"activations.{'_'.join(map(str, array.reshape(-1)))}"
        self.constants[name] = known_constant(array)
        return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Halved:
    """A product with the halves of a tensor: which tensor, the node that multiplies, and the nodes that go with it."""

    given: str
    product: NodeProto
    join: NodeProto


def halved(producers: Mapping[str, NodeProto], join: NodeProto) -> Halved | None:
    """What `Activations` has made of a tensor and a product, from the last node of it; None for any other node."""
    product = producers.get(join.input[0]) if join.op_type == "ReduceSum" else None
    both = producers.get(product.input[0]) if product is not None and product.op_type == "MatMulNBits" else None
    rest = producers.get(both.input[1]) if both is not None and both.op_type == "Concat" else None
    whole = producers.get(rest.input[0]) if rest is not None and rest.op_type == "Sub" else None
    if product is None or whole is None or ".halves_of_" not in product.input[0]:
        return None
    return Halved(given=whole.input[0], product=product, join=join)
