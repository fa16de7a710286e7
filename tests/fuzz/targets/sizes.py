"""Sizes as users write them, against fractions."""

from __future__ import annotations

import re
from fractions import Fraction

from tests.fuzz.mutations import text_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.machine.sizes import format_bytes, parse_budget

_SEEDS = (
    "256MB", "256 MiB", "1.5GB", "auto", "268435456", "1T", "0.5 gib", " 12kB ", "999999", "1000000", "0", "1e9",
    "4.35K", "9007199254740993B", "0.001MB", "1.0000000000000001TB",
)  # fmt: skip
_WORDS = (
    "0", "1", "9", "9" * 20, "9" * 400, "9" * 5000, ".", "-", "+", "e", "E9", "K", "M", "G", "T", "i", "I", "B", "b",
    " ", "\t", "\n", "\x1c", "auto", "AUTO", "inf", "nan", "_", ",", "\u0663", "\u00b2", "\uff11", "\u212a", "\u0131",
    "\u00df", "\ufb01", "0x", "MB", "MiB",
)  # fmt: skip
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"([0-9]+)(?:\.([0-9]+))?\s*([a-z]*?)b?")


def _prepare() -> Trial:
    def trial(data: bytes) -> bool:
        text = data.decode(errors="surrogateescape")
        found = parse_budget(text)
        if found is None:
            if text.strip().lower() != "auto":
                raise Wrong("it is no 'auto'", repr(text))
            return True
        plain = _SIZE.fullmatch(text.strip().lower())
        if plain is None:
            raise Wrong("what is no size in plain digits was taken", f"{text!r} as {found}")
        whole, part, unit = plain[1], plain[2] or "", plain[3]
        exact = Fraction(int(whole + part), 10 ** len(part)) * _UNITS[unit]
        if found != exact.__floor__():
            raise Wrong("it is another number of bytes", f"{text!r} is {exact.__floor__()}, not {found}")
        if parse_budget(found) != found or not format_bytes(found):
            raise Wrong("a number of bytes is read as another", found)
        return True

    return trial


TARGETS = (
    Target(
        name="sizes",
        what='sizes ("256MB")',
        prepare=_prepare,
        seeds=lambda: [seed.encode() for seed in _SEEDS],
        mutate=text_of(_WORDS),
        share=0.5,
    ),
)
