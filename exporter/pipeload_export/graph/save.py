"""Tensors written one after another into a file, and a graph -> a model's file with such a file beside it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeload_export.graph.external_data import set_place
from pipeload_export.graph.graph import PACKED, Constant, Graph, tensor_proto
from pipeload_export.graph.types import plain_model

__all__ = ["GraphFile", "TensorFile", "TensorPlace"]

_ALIGNED_BYTES = 4096
_INLINE_BYTES = 1024
"""Smaller constants are kept inside of the graph."""


class TensorPlace(NamedTuple):
    """A tensor in a file: ONNX's number of its element type, its shape, and its first byte."""

    dtype: int
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """A file of tensors that is being written; a context, at whose end it is closed.

    Args:
        path: the file, in an existing folder.

    Attributes:
        places: those of the tensors that were declared, by name.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.places: dict[str, TensorPlace] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self) -> int:
        """Where the next tensor begins."""
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNED_BYTES))
        return self._file.tell()

    def write(self, values: NDArray[Any]) -> None:
        """The next values of the tensor that has begun."""
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def declare(self, name: str, dtype: int, shape: tuple[int, ...], offset: int) -> None:
        """Make a tensor of what was written; several may be of the same bytes.

        Args:
            name: the tensor's.
            dtype: ONNX's number of the element type.
            shape: its dimensions.
            offset: what `begin` returned.
        """
        self.places[name] = TensorPlace(dtype, shape, offset)

    def add(self, name: str, values: NDArray[Any]) -> None:
        """A tensor whose values are in memory."""
        offset = self.begin()
        self.write(values)
        self.declare(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, offset)


class GraphFile(TensorFile):
    """A model that is being written, and the file with its weights.

    Args:
        path: the model's file, in an existing folder.
        data_name: name of the file with its weights, in the same folder.
    """

    def __init__(self, path: Path, data_name: str) -> None:
        super().__init__(path.parent / data_name)
        self._path = path
        self._data_name = data_name

    def finish(self, graph: Graph) -> None:
        """Write the other constants of the graph, and the graph itself.

        Args:
            graph: its nodes may take tensors of this file that are not among its constants.
        """
        inside = []
        for name, constant in graph.constants.items():
            if constant.nbytes < _INLINE_BYTES or constant.dtype in PACKED:
                inside.append(tensor_proto(name, constant))
            else:
                offset = self.begin()
                self.write(constant.values())
                self.declare(name, constant.dtype, constant.shape, offset)
                graph.forget()
        values = [*inside, *(self._initializer(name, place) for name, place in self.places.items())]
        model = plain_model(graph, graph.nodes, graph.inputs, graph.outputs, values)
        self._path.write_bytes(model.SerializeToString(deterministic=True))

    def _initializer(self, name: str, place: TensorPlace) -> TensorProto:
        proto = TensorProto(name=name, data_type=place.dtype, dims=place.shape)
        nbytes = Constant(place.dtype, place.shape, lambda: np.empty(0)).nbytes
        set_place(proto, self._data_name, place.offset, nbytes)
        return proto
