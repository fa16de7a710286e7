"""Protobuf messages, field by field. Pure.

Source: "Encoding" of Protocol Buffers (https://protobuf.dev).
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["encoded", "fields", "packed", "signed", "spans", "text"]

_BYTES = 2
"""The wire type of a text, of bytes and of a message."""


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message: an int, or the bytes of a text, a message or a float.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    return ((number, value) for number, value, _ in spans(data))


def spans(data: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """The fields of a message, each with all of its bytes: its tag and its length too."""
    at = 0
    while at < len(data):
        begin = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value, data[begin:at]
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field has the unknown kind {wire}")
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + size], data[begin : at + size]
        at += size


def encoded(number: int, value: int | bytes) -> bytes:
    """A field of a message: a number that is not negative, or bytes."""
    if isinstance(value, int):
        return _as_varint(number << 3) + _as_varint(value)
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(value)) + value


def packed(data: memoryview) -> list[int]:
    """The numbers of a packed field."""
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def signed(value: int) -> int:
    """A number of 64 bits that protobuf has written without its sign."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def text(value: int | bytes | memoryview) -> str:
    """A text; empty where the field holds none.

    Raises:
        ValueError: it is no UTF-8, so that another reader may take it for another text.
    """
    return "" if isinstance(value, int) else bytes(value).decode()


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
