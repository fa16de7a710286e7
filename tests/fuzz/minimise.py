"""A smaller corpus that reaches as much, and a shorter input that breaks the same promise."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.fuzz.corpora import CORPUS, keep, known
from tests.fuzz.run import Broken, checked, input_of, try_all
from tests.fuzz.target import Target

__all__ = ["least_corpus", "reached", "smaller"]

_MOST_BYTES = 6000
"""Of an input of the corpus."""
_MOST_INPUTS = 60
_MUTATED = 200
"""Inputs that are made of the known ones."""
_MOST_TRIES = 400
_PACKAGES = (f"{os.sep}pipeload{os.sep}", f"{os.sep}pipeload_export{os.sep}")


def least_corpus(target: Target) -> None:
    """Keep, of a corpus and some mutated inputs, short ones that reach all lines of the product that all of them reach.

    Files whose names begin with `seed` stay: they are valid, and others are made of them.
    """
    pool = [*known(CORPUS, target.name), *target.seeds()]
    made = (input_of(target, pool, 0, number) for number in range(len(pool) + _MUTATED))
    inputs = sorted({data for data in made if len(data) <= _MOST_BYTES}, key=lambda data: (len(data), data))
    lines = reached(target, inputs)
    kept: list[bytes] = []
    left = set().union(*lines) if lines else set()
    while left and len(kept) < _MOST_INPUTS:
        best = max(range(len(inputs)), key=lambda number: len(lines[number] & left))
        kept.append(inputs[best])
        left -= lines[best]
    for path in (CORPUS / target.name).glob("*"):
        if not path.name.startswith("seed"):
            path.unlink()
    keep(CORPUS, target.name, kept)
    total = len(set().union(*lines)) if lines else 0
    print(f"{target.name}: {len(kept)} of {len(inputs)} inputs, {sum(map(len, kept)):,} bytes, reach {total} lines")


def reached(target: Target, inputs: list[bytes]) -> list[set[tuple[str, int]]]:
    """The lines of the product that each input reaches, found in a child."""
    taking, giving = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(taking)
            found = _lines(target, inputs)
            with os.fdopen(giving, "wb") as pipe:
                pipe.write(pickle.dumps(found))
        finally:
            os._exit(0)
    os.close(giving)
    with os.fdopen(taking, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        raise RuntimeError(f"An input of the corpus of {target.name} ends the process.")
    result: list[set[tuple[str, int]]] = pickle.loads(said)
    return result


def _lines(target: Target, inputs: list[bytes]) -> list[set[tuple[str, int]]]:
    trial = target.prepare()
    found: list[set[tuple[str, int]]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not any(part in name for part in _PACKAGES):
            return None
        if event == "line":
            found[-1].add((name, frame.f_lineno))
        return trace

    with checked(target) as check:
        for data in inputs:
            found.append(set())
            sys.settrace(trace)
            try:
                check(trial, data)
            finally:
                sys.settrace(None)
    return found


def smaller(target: Target, broken: Broken) -> bytes:
    """A shorter input that breaks the same promise: pieces are cut out, halves first, as long as that holds."""
    data, tries = broken.data or b"", 0
    size = len(data) // 2
    while size and tries < _MOST_TRIES:
        at = 0
        while at < len(data) and tries < _MOST_TRIES:
            tries += 1
            shorter = data[:at] + data[at + size :]
            if any(one.reason == broken.reason for one in try_all(target, [shorter]).broken):
                data = shorter
            else:
                at += size
        size //= 2
    return data
