"""Inputs of every strange form, made from known ones by a seed: bytes, and JSON with its structure kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

import msgspec
from tests.fuzz.target import Mutate

__all__ = ["bytes_of", "damaged", "exchanged", "json_of", "one_of", "text_of"]

_BYTES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\r", b'"', b"\\", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82")
_NUMBERS = tuple(
    (number % (1 << 8 * size)).to_bytes(size, "little")
    for size in (2, 4, 8)
    for number in (0, 1, -1, 1 << 31, (1 << 31) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, 255, 65536)
)
_LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 4096, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, 1.0, -0.0,
    1e308, 1e-320, "", "x", "..", "../x", "/x", ".", "a/./b", "a\\b", "\0", "\n", "x" * 300, "\u0663", "\u00b9", "1",
    "+", " + ", "a + b", "1 + 1", "9" * 200, "\u2028", "\U0001f642", [], {}, [[]], [None], [0], [0, 0], {"x": 1},
    *map(
        msgspec.Raw,
        (
            b"1e999", b"-1e999", b"NaN", b"Infinity", b'"\\ud800"', b"1" + b"0" * 400, b"9" * 5000, b"0.1e1",
            b"[" * 600 + b"]" * 600, b'{"a":' * 600 + b"1" + b"}" * 600, b"[" * 5000, b'"\xff"', b"1.5e300",
        ),
    ),
)  # fmt: skip


def damaged(chance: Random, data: bytes, pool: Sequence[bytes] = ()) -> bytes:
    """Bytes with one to four places changed, cut out, grown, doubled, or taken from another input."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        size = len(made)
        at = int(chance.random() * (size + 1))
        match int(chance.random() * 9):
            case 0 if size:
                made[at - 1] ^= 1 << int(chance.random() * 8)
            case 1:
                made[at : at + 1] = bytes((int(chance.random() * 256),))
            case 2:
                made[at:at] = chance.choice(_BYTES)
            case 3:
                piece = chance.choice(_NUMBERS)
                made[at : at + len(piece)] = piece
            case 4:
                del made[at : at + 1 + int(chance.random() ** 3 * 64)]
            case 5:
                piece = bytes(made[at : at + 1 + int(chance.random() ** 3 * 64)])
                made[at:at] = piece * chance.choice((1, 1, 2, 10))
            case 6:
                del made[at:]
            case 7 if pool:
                other = chance.choice(pool)
                begin = int(chance.random() * (len(other) + 1))
                made[at : at + 8] = other[begin : begin + 1 + int(chance.random() * 64)]
            case _:
                made[at : at + 1] = b"%d" % int(chance.random() * 300)
    return bytes(made)


def exchanged(chance: Random, tree: Any) -> Any:
    """A JSON value with one to three parts replaced, dropped, doubled, added, or taken from another place of it.

    The value itself stays as it is.
    """
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree = _changed(chance, tree, tree)
    return tree


def _changed(chance: Random, part: Any, whole: Any) -> Any:
    """A part with something in it changed; only the containers on the way there are copied."""
    if not isinstance(part, dict | list) or not part:
        return _other(chance, part, whole)
    here = chance.random()
    if here < 0.06:
        return _other(chance, part, whole)
    if isinstance(part, dict):
        copy: Any = dict(part)
        key: Any = chance.choice([*part])
        if here < 0.12:
            del copy[key]
        elif here < 0.16:
            copy[str(_leaf(chance, whole))[:200] if chance.random() < 0.5 else f"{key}x"] = part[key]
        else:
            copy[key] = _changed(chance, part[key], whole)
        return copy
    copy = list(part)
    key = int(chance.random() * len(part))
    if here < 0.12:
        del copy[key]
    elif here < 0.18:
        copy.insert(int(chance.random() * (len(part) + 1)), part[key])
    elif here < 0.22:
        other = int(chance.random() * len(part))
        copy[key], copy[other] = part[other], part[key]
    else:
        copy[key] = _changed(chance, part[key], whole)
    return copy


def _other(chance: Random, old: Any, whole: Any) -> Any:
    here = chance.random()
    if isinstance(old, int) and not isinstance(old, bool) and here < 0.4:
        return old + chance.choice((1, -1, 2, 4096, old, -2 * old, 2**31))
    if isinstance(old, str) and here < 0.3:
        return damaged(chance, old.encode(errors="replace"), ()).decode(errors="replace")
    return _leaf(chance, whole) if here < 0.7 else chance.choice(_LEAVES)


def _leaf(chance: Random, part: Any) -> Any:
    while isinstance(part, dict | list) and part and chance.random() < 0.95:
        part = part[chance.choice([*part]) if isinstance(part, dict) else int(chance.random() * len(part))]
    return part


@lru_cache(maxsize=4096)
def _tree(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def json_bytes(tree: Any) -> bytes:
    """A value as JSON; of what msgspec cannot write, the JSON of Python."""
    try:
        return msgspec.json.encode(tree)
    except (UnicodeEncodeError, RecursionError, OverflowError, TypeError, ValueError):
        return json.dumps(tree, default=lambda raw: str(bytes(raw), "utf-8", "replace")).encode(errors="replace")


def json_of(chance: Random, pool: Sequence[bytes]) -> bytes:
    """JSON with parts exchanged; sometimes damaged bytes of it."""
    data = chance.choice(pool)
    tree = _tree(data)
    if tree is None or chance.random() < 0.15:
        return damaged(chance, data, pool)
    data = json_bytes(exchanged(chance, tree))
    return damaged(chance, data, pool) if chance.random() < 0.05 else data


def bytes_of(chance: Random, pool: Sequence[bytes]) -> bytes:
    """Damaged bytes."""
    return damaged(chance, chance.choice(pool), pool)


def text_of(words: Sequence[str]) -> Mutate:
    """Mutations of texts that know some words of their language."""
    known = [word.encode() for word in words]

    def mutate(chance: Random, pool: Sequence[bytes]) -> bytes:
        data = chance.choice(pool)
        for _ in range(chance.choice((1, 1, 2, 3, 5))):
            here = chance.random()
            if here < 0.25:
                data = damaged(chance, data, pool)
                continue
            begin = int(chance.random() * (len(data) + 1))
            end = begin + int(chance.random() ** 3 * 40)
            data = data[:begin] + chance.choice(known) + data[begin if here < 0.6 else end :]
        return data

    return mutate


def one_of(*mutations: Mutate) -> Mutate:
    """Any of these, each as often."""

    def mutate(chance: Random, pool: Sequence[bytes]) -> bytes:
        return chance.choice(mutations)(chance, pool)

    return mutate
