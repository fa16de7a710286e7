"""Sizes in bytes, as users write them.

`MB` is 1000 * 1000 bytes and `MiB` is 1024 * 1024, as in the SI and as `docker` does not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pipeload.errors import ConfigError

__all__ = ["format_bytes", "parse_budget", "parse_bytes"]

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KkMmGgTt]?)([Ii]?)[Bb]?")
"""No \\d and no change of case, which take digits and letters of other scripts for these."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_LIKELY_MEGABYTES = 10**6
"""A number below this, without a unit, was meant in megabytes: no process runs in that few bytes."""


def parse_bytes(size: int | str) -> int:
    """Bytes of `268435456`, `"256MB"`, `"256 MiB"` or `"1.5GB"`.

    Raises:
        ConfigError: the text is no size, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"A size in bytes is an int or a text such as '256MB', not {size!r}.")
    if isinstance(size, int):
        value = size
    else:
        match = _SIZE.fullmatch(size.strip())
        if not match or (match[3] and not match[2]):
            raise ConfigError(f"{size!r:.80} is no size in bytes. Write it as 268435456, '256MB' or '256MiB'.")
        number = Fraction(match[1])
        if size.strip()[-1].isdigit() and 0 < number < _LIKELY_MEGABYTES:
            raise ConfigError(f"The size in bytes '{size}' means {match[1]} bytes. Write '{match[1]}MB' for megabytes.")
        value = int(number * (_BINARY_UNITS if match[3] else _UNITS)[match[2].upper()])
    if value <= 0:
        raise ConfigError(f"A size in bytes is positive, not {size!r}. Write it as 268435456, '256MB' or '256MiB'.")
    return value


def parse_budget(size: int | str) -> int | None:
    """Bytes of a memory budget: as `parse_bytes`, or None for `"auto"`, in any case."""
    if isinstance(size, str) and size.strip().lower() == "auto":
        return None
    return parse_bytes(size)


def format_bytes(nbytes: float) -> str:
    """`"268.4 MB"`: the size in the decimal unit that fits."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
