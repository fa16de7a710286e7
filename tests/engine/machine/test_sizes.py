"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeload.errors import ConfigError
from pipeload.machine import sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        ("268435456", 268435456),
        ("256MB", 256_000_000),
        ("256 MiB", 256 * 2**20),
        (" 1.5GB ", 1_500_000_000),
        ("2gib", 2 * 2**30),
        ("100K", 100_000),
        ("0.5KiB", 512),
        ("1TB", 10**12),
        ("77 B", 77),
        ("9007199254740993B", 9007199254740993),
        ("1.001K", 1001),
        ("8.03K", 8030),
    ],
)
def test_sizes_are_read_as_people_write_them(text: int | str, nbytes: int) -> None:
    assert sizes.parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "-1",
        "1e9",
        "12 PB",
        "1.MB",
        "1,5GB",
        "iB",
        "5iB",
        "nan",
        "0",
        "0.4",
        "2\u066356MB",
        "1.5G\u0131",
        "9" * 400,
        "9" * 5000,
        0,
        -5,
        True,
        1.5,
        None,
        b"1",
    ],
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="size in bytes"):
        sizes.parse_bytes(text)


@pytest.mark.parametrize("text", ["256", " 1 ", "1.5", "999999"])
def test_a_number_that_was_meant_in_megabytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{text}' means {text.strip()} bytes\. Write '{text.strip()}MB'"):
        sizes.parse_bytes(text)
    assert sizes.parse_bytes("1000000") == sizes.parse_bytes("1MB")


@pytest.mark.parametrize("text", ["auto", "AUTO", " Auto "])
def test_an_automatic_budget_may_be_written_in_any_case(text: str) -> None:
    assert sizes.parse_budget(text) is None
    assert sizes.parse_budget("2MB") == 2_000_000


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (268_435_456, "268.4 MB"), (1_340_000_000, "1.34 GB")],
)
def test_sizes_are_written_in_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert sizes.format_bytes(nbytes) == text
