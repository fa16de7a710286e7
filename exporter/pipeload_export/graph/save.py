"""A graph -> a model's file, with its weights in another file beside it, written one after another."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeload_export.graph.external_data import set_place
from pipeload_export.graph.graph import PACKED, Constant, Graph, tensor_proto
from pipeload_export.graph.types import plain_model

__all__ = ["GraphFile"]

_ALIGNED_BYTES = 4096
_INLINE_BYTES = 1024
"""Smaller constants are kept inside of the graph."""


class GraphFile:
    """A model that is being written; a context, at whose end the file with its weights is closed.

    Args:
        path: the model's file, in an existing folder.
        data_name: name of the file with its weights, in the same folder.
    """

    def __init__(self, path: Path, data_name: str) -> None:
        self._path = path
        self._data_name = data_name
        self._file = (path.parent / data_name).open("wb")
        self._initializers: dict[str, TensorProto] = {}

    def __enter__(self) -> GraphFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self) -> int:
        """Where the next tensor begins in the weights file."""
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNED_BYTES))
        return self._file.tell()

    def write(self, values: NDArray[Any]) -> None:
        """The next values of the tensor that has begun."""
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def declare(self, name: str, dtype: int, shape: tuple[int, ...], offset: int) -> None:
        """Make an initializer of what was written; several may be of the same bytes.

        Args:
            name: the initializer's.
            dtype: ONNX's number of the element type.
            shape: its dimensions.
            offset: what `begin` returned.
        """
        proto = TensorProto(name=name, data_type=dtype, dims=shape)
        set_place(proto, self._data_name, offset, Constant(dtype, shape, lambda: np.empty(0)).nbytes)
        self._initializers[name] = proto

    def add(self, name: str, values: NDArray[Any]) -> None:
        """An initializer whose values are in memory."""
        offset = self.begin()
        self.write(values)
        self.declare(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, offset)

    def finish(self, graph: Graph) -> None:
        """Write the other constants of the graph, and the graph itself.

        Args:
            graph: its nodes may take initializers of this file that are not among its constants.
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
        model = plain_model(graph, graph.nodes, graph.inputs, graph.outputs, [*inside, *self._initializers.values()])
        self._path.write_bytes(model.SerializeToString(deterministic=True))
