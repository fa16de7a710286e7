"""The header of a GGUF file, walked with every length held against the file, before a library makes objects of it.

The package gguf believes the file: a count of 2**60 keeps it busy for ever, and each value of an array becomes an
object of hundreds of bytes.

```
magic, version, number of tensors, number of keys
key:     name, type, value            a string has its length before it, an array its type and its count
tensor:  name, number of dimensions, dimensions, type, offset
```
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import BinaryIO

from pipeload.machine.files import open_file

__all__ = ["check_header"]

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes; strings and arrays have lengths of their own."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT, _MOST_ALIGNMENT = "general.alignment", 1 << 20
_MOST_ENTRIES, _MOST_VALUES = 1 << 16, 1 << 22
"""Keys, and tensors; and values of all arrays together. A vocabulary of 262 144 tokens takes about 1.3 million."""
_MOST_NAME, _MOST_DIMENSIONS = 1 << 16, 8


def check_header(path: Path) -> None:
    """Walk the header of a file. Memory does not depend on what the file says.

    Raises:
        OSError: the file cannot be read, or is no regular one.
        ValueError: it is no GGUF file; or a length, a count or a tensor does not fit into it, or is unusually large.
    """
    with open_file(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        _Header(file, os.fstat(descriptor).st_size).walk()


class _Header:
    def __init__(self, file: BinaryIO, nbytes: int) -> None:
        self._file, self._nbytes = file, nbytes
        self._order = "<"
        self._values = 0

    def walk(self) -> None:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        (version,) = self._numbers("I")
        if not version & 0xFFFF:
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}, and {_joined(_VERSIONS)} are known")
        tensors, keys = self._numbers("QQ")
        for what, count in (("keys", keys), ("tensors", tensors)):
            if count > _MOST_ENTRIES:
                raise ValueError(f"it says that it has {count} {what}, and at most {_MOST_ENTRIES} are taken")
        for _ in range(keys):
            name = self._name()
            (kind,) = self._numbers("I")
            self._skip_value(kind, name)
        for _ in range(tensors):
            self._skip_tensor()

    def _skip_value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            (length,) = self._numbers("Q")
            self._skip(length, key)
        elif kind == _ARRAY:
            inner, count = self._numbers("IQ")
            self._values += count
            if self._values > _MOST_VALUES:
                raise ValueError(f"'{key}' ends beyond {_MOST_VALUES} values of arrays, the most that is taken")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner], key)
            elif inner == _STRING:
                for _ in range(count):
                    self._skip_value(inner, key)
            else:
                raise ValueError(f"'{key}' is an array of values of type {inner}")
        elif key == _ALIGNMENT and kind == _UINT32:
            (alignment,) = self._numbers("I")
            if not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
                raise ValueError(
                    f"its tensors are aligned to {alignment} bytes, which is no power of two that is taken"
                )
        elif kind in _SIZES:
            self._skip(_SIZES[kind], key)
        else:
            raise ValueError(f"'{key}' has a value of the unknown type {kind}")

    def _skip_tensor(self) -> None:
        name = self._name()
        (rank,) = self._numbers("I")
        if rank > _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {rank} dimensions, and at most {_MOST_DIMENSIONS} are taken")
        shape = self._numbers("Q" * rank)
        _, offset = self._numbers("IQ")
        # No type has less than a bit for each value.
        if prod(shape) > 8 * self._nbytes or offset > self._nbytes:
            raise ValueError(f"tensor '{name}' of shape {list(shape)} does not fit into its {self._nbytes} bytes")

    def _name(self) -> str:
        (length,) = self._numbers("Q")
        if length > _MOST_NAME:
            raise ValueError(f"a name has {length} bytes, and at most {_MOST_NAME} are taken")
        return self._file.read(length).decode("utf-8", "replace")

    def _numbers(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize(self._order + layout)
        found = self._file.read(size)
        if len(found) < size:
            raise ValueError(f"its header ends at byte {self._nbytes}, within a value")
        return struct.unpack(self._order + layout, found)

    def _skip(self, nbytes: int, key: str) -> None:
        end = self._file.tell() + nbytes
        if end > self._nbytes:
            raise ValueError(f"'{key}' would end at byte {end}, and it has {self._nbytes}")
        self._file.seek(end)


def _joined(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
