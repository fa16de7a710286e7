"""The header of a weights file, checked against the manifest. Pure.

A safetensors file begins with the length of its header, 8 bytes, and the header, JSON: for each tensor its dtype, shape
and place, counted from the header's end. Source: "Safetensors" (https://github.com/huggingface/safetensors), Format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Any

from pipeload.errors import ShardError
from pipeload.format.dtypes import SAFETENSORS_DTYPES, dtype_bytes
from pipeload.format.manifest import WeightSpec

__all__ = ["check_header", "elements", "most_header_bytes", "places"]

_MOST_NUMBER, _MOST_RANK = 2**63 - 1, 64
_HEADER_BYTES, _ENTRY_BYTES = 1 << 20, 4096
"""Of a header beside its tensors, and for each tensor."""


def elements(shape: object) -> int:
    """The number of values of a tensor, found in a time that does not depend on the numbers of its shape.

    Raises:
        ValueError: it is no shape, or one of more dimensions or larger ones than a tensor can have.
    """
    if not isinstance(shape, list | tuple) or len(shape) > _MOST_RANK:
        raise ValueError(f"a tensor has no shape of at most {_MOST_RANK} dimensions")
    found = 1
    for size in shape:
        if not isinstance(size, int) or not 0 <= size <= _MOST_NUMBER:
            raise ValueError("a tensor has a dimension of no possible size")
        found *= size
    return found


def most_header_bytes(tensors: int) -> int:
    """The longest header that is read of a file with this many tensors: objects made of it are many times as large."""
    return _HEADER_BYTES + _ENTRY_BYTES * tensors


def places(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor -> its dtype, its shape, and its first byte in the file.

    Args:
        header: the JSON of the file's header.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    found = {}
    for name, entry in json.loads(header, object_pairs_hook=_once_each).items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end <= _MOST_NUMBER):
            raise ValueError("a tensor lies at no possible place")
        if end - begin != elements(shape) * dtype_bytes(dtype):
            raise ValueError("the length of a tensor is not that of its shape")
        found[name] = dtype, tuple(shape), 8 + len(header) + begin
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name occurs twice")
    return made


def check_header(name: str, header: bytes, tensors: Sequence[WeightSpec], slices: Sequence[WeightSpec]) -> None:
    """Check that the file's header gives each expected tensor the place, dtype and shape that the manifest gives it.

    Args:
        name: the file, as the manifest names it.
        header: its JSON.
        tensors: the tensors that the file must have under the same names.
        slices: slices of a head, which have no names of their own in the header: each lies within one of its tensors.

    Raises:
        ShardError: the header is damaged, or another file's.
    """
    try:
        found = places(header)
        spans = [(dtype, begin, begin + prod(shape) * dtype_bytes(dtype)) for dtype, shape, begin in found.values()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Some errors quote all that they were given.
        fact = f"{type(error).__name__}, {error}"
        raise ShardError(f"'{name}' has a damaged safetensors header: {fact:.200}. Export the model again.") from error
    for spec in tensors:
        if found.get(spec.name) != (spec.dtype, spec.shape, spec.offset):
            raise ShardError(
                f"'{name}' is not the file that the manifest describes: tensor '{spec.name}' is "
                f"{found.get(spec.name)}, expected {(spec.dtype, spec.shape, spec.offset)}. Export the model again."
            )
    for spec in slices:
        end = spec.offset + spec.nbytes
        if not any(d == spec.dtype and begin <= spec.offset and end <= last for d, begin, last in spans):
            raise ShardError(
                f"'{name}' is not the file that the manifest describes: it has no tensor around "
                f"'{spec.name}', bytes {spec.offset} to {end}. Export the model again."
            )
