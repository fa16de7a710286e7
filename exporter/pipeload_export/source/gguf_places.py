"""Where the weights of a model of transformers lie in a GGUF file.

transformers makes a tensor of the model of each tensor of the file: it takes the blocks apart, and then changes the
tensor as the architecture wants it. Of a matrix it changes at most the order of the rows; that is found with the
numbers of the rows in the place of values, and then held against the values, a tensor at a time. What is small is made
here, and put into a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload_export.source.places import Place, Places, places_in
from pipeload_export.source.refused import Declined

__all__ = ["SMALL_BYTES", "places_in_gguf"]

SMALL_BYTES = 256 << 10
"""Of float32: smaller tensors are made here."""
_SMALL_NAME = "small.safetensors"


def places_in_gguf(path: Path, model: Any, folder: Path) -> Places:
    """Where the weights lie, by the model's names.

    Args:
        path: the file.
        model: of transformers, with or without weights.
        folder: where the small ones go.

    Raises:
        Declined: transformers makes something else of a matrix.
    """
    from safetensors.numpy import save_file

    small: dict[str, NDArray[np.float32]] = {}
    large: Places = {}
    for name, tensor, read in _tensors(path, model):
        if tensor.n_elements * 4 <= SMALL_BYTES:
            made = read(_values(tensor))
            if made is not None:
                small[name] = np.ascontiguousarray(made, np.float32)
        else:
            large[name] = _place(path, tensor, read)
    save_file(small, folder / _SMALL_NAME)
    return places_in([folder / _SMALL_NAME]) | large


def _tensors(path: Path, model: Any) -> Iterator[tuple[str, Any, Any]]:
    """The tensors that the model takes: its name, the tensor in the file, and what transformers does with its values,
    which gives None for what it puts elsewhere.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    reader = GGUFReader(str(path))
    architecture = read_field(reader, "general.architecture")[0]
    config = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model)
    for tensor in reader.tensors:
        if tensor.name not in names:
            continue

        def read(values: NDArray[Any], own: str = tensor.name) -> NDArray[Any] | None:
            made = processor.process(
                weights=values, name=own, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            return None if made.name != own else made.weights

        yield names[tensor.name], tensor, read


def _values(tensor: Any) -> NDArray[np.float32]:
    from gguf import dequantize

    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return values


def _place(path: Path, tensor: Any, read: Any) -> Place:
    columns, *others = (int(size) for size in tensor.shape)
    shape = (*reversed(others), columns)
    rows = int(tensor.n_elements) // columns
    moved = read(np.arange(rows).reshape(*shape[:-1], 1)) if others else None
    if moved is None or moved.shape != (*shape[:-1], 1):
        raise Declined(f"transformers makes something else of the file's {tensor.name}")
    order = moved.reshape(-1)
    # The number of the row is where its values are; and nothing else was done to them.
    values = _values(tensor)
    if not np.array_equal(read(values), values.reshape(rows, columns)[order].reshape(shape), equal_nan=True):
        raise Declined(f"transformers computes with the values of the file's {tensor.name}")
    return Place(
        file=str(path.resolve()),
        dtype=tensor.tensor_type.name,
        begin=int(tensor.data_offset),
        elements=rows * columns,
        shape=shape,
        strides=tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))),
        columns=columns,
        order=None if np.array_equal(order, np.arange(rows)) else tuple(order.tolist()),
    )
