"""Messages are read and written field by field, and a damaged one is refused."""

from __future__ import annotations

import pytest

from pipeload.format.protobuf import encoded, fields, packed, spans, text


@pytest.mark.parametrize("number", [1, 15, 16, 2000])
@pytest.mark.parametrize("value", [0, 1, 127, 128, 2**32, 2**63, b"", b"a", b"x" * 300])
def test_a_field_comes_back_as_it_was_written(number: int, value: int | bytes) -> None:
    data = encoded(number, value) + encoded(1, 5)
    (first, found, whole), (second, five, _) = spans(memoryview(data))
    assert (first, second, five) == (number, 1, 5)
    assert found == value
    assert bytes(whole) == encoded(number, value)


def test_numbers_of_fixed_size_are_their_bytes() -> None:
    data = bytes([1 << 3 | 1, *range(8), 2 << 3 | 5, *range(4)])
    assert [(number, bytes(value)) for number, value in fields(memoryview(data)) if not isinstance(value, int)] == [
        (1, bytes(range(8))),
        (2, bytes(range(4))),
    ]


def test_packed_numbers_and_texts() -> None:
    assert packed(memoryview(b"\x01\xac\x02")) == [1, 300]
    assert packed(memoryview(b"")) == []
    assert (text(7), text(b"\xc3\xa4")) == ("", "ä")
    with pytest.raises(ValueError, match="utf-8"):
        text(memoryview(b"\xff"))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\x0b", "unknown kind 3"),
        (b"\x0c", "unknown kind 4"),
        (b"\x0a\x05ab", "ends in the middle"),
        (b"\x0d\x00", "ends in the middle"),
        (b"\x09" + bytes(7), "ends in the middle"),
        (b"\x08" + b"\xff" * 10, "more than ten bytes"),
    ],
)
def test_a_damaged_message_is_refused(data: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        list(spans(memoryview(data)))


@pytest.mark.parametrize("data", [b"\x08", b"\x80", b"\x0a\x80"])
def test_a_message_that_ends_within_a_number_is_refused(data: bytes) -> None:
    with pytest.raises(IndexError):
        list(spans(memoryview(data)))
