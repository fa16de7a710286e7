"""The header of a weights file, checked against the manifest. Pure.

A safetensors file begins with the length of its header, 8 bytes, and the header, JSON: for each tensor its dtype, shape
and place, counted from the header's end. Source: "Safetensors" (https://github.com/huggingface/safetensors), Format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import msgspec

from pipeload.errors import ShardError
from pipeload.format.dtypes import SAFETENSORS_DTYPES, dtype_bytes
from pipeload.format.manifest import WeightSpec

__all__ = ["Entry", "check_header", "entries", "most_header_bytes", "places"]

_HEADER_BYTES, _ENTRY_BYTES = 1 << 20, 4096
"""Of a header beside its tensors, and for each tensor."""

_METADATA = "__metadata__"

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Entry(msgspec.Struct, frozen=True):
    """A tensor in a header.

    Attributes:
        dtype: the format's name of its type, which may be one that pipeload does not know.
        shape: its dimensions.
        data_offsets: its first byte and one past its last, counted from the header's end.
    """

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self.data_offsets[1] - self.data_offsets[0]


def entries(header: bytes) -> tuple[dict[str, Entry], dict[str, str] | None]:
    """Tensor -> its entry, and the metadata, of a header that may say anything: all numbers are bounded.

    Args:
        header: the JSON of the file's header.

    Raises:
        ValueError: it is damaged.
    """
    try:
        # msgspec would take the last of two entries of one name.
        raw = msgspec.convert(json.loads(header, object_pairs_hook=_once_each), dict[str, Any])
        metadata = msgspec.convert(raw.pop(_METADATA, None), dict[str, str] | None)
        found = {name: msgspec.convert(entry, Entry) for name, entry in raw.items()}
        if any(entry.nbytes < 0 for entry in found.values()):
            raise ValueError("a tensor ends before it begins")
        return found, metadata
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def most_header_bytes(tensors: int) -> int:
    """The longest header that is read of a file with this many tensors: objects made of it are many times as large."""
    return _HEADER_BYTES + _ENTRY_BYTES * tensors


def places(header: bytes) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor -> its dtype, its shape, and its first byte in the file.

    Args:
        header: the JSON of the file's header.

    Raises:
        ValueError: it is damaged.
    """
    found = {}
    for name, entry in entries(header)[0].items():
        if (dtype := SAFETENSORS_DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"tensor '{name}' has the unknown type '{entry.dtype}'")
        if entry.nbytes != prod(entry.shape) * dtype_bytes(dtype):
            raise ValueError("the length of a tensor is not that of its shape")
        found[name] = dtype, entry.shape, 8 + len(header) + entry.data_offsets[0]
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
    except ValueError as error:
        # Some errors quote all that they were given.
        raise ShardError(
            f"'{name}' has a damaged safetensors header: {error!r:.200}. Export the model again."
        ) from error
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
