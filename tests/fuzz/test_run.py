"""What breaks a promise is found, told with its input, and does not end the run."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from random import Random

import pytest
from tests.fuzz.minimise import smaller
from tests.fuzz.mutations import bytes_of, json_of
from tests.fuzz.run import inputs_of, run, try_all
from tests.fuzz.sketch import about
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.errors import ConfigError

_KEPT: list[bytes] = []


def _never_ends() -> None:
    while True:
        pass


def _raise(error: Exception) -> None:
    raise error


_BREAKS: dict[bytes, tuple[Callable[[], object], str]] = {
    b"foreign": (lambda: _raise(OverflowError("x")), "OverflowError"),
    b"wrong": (lambda: _raise(Wrong("one is two")), "wrong: one is two"),
    b"killed": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "it ended the process by SIGSEGV"),
    b"exits": (lambda: os._exit(3), "it ended the process with status 3"),
    b"memory": (lambda: bytes(1 << 33), "MemoryError"),
    b"hangs": (_never_ends, "it took more than 1 s"),
}


def _target() -> Target:
    def prepare() -> Trial:
        def trial(data: bytes) -> bool:
            if data in _BREAKS:
                _BREAKS[data][0]()
            if data == b"grows":
                _KEPT.append(bytes(range(256)) * 4096)
            if data == b"refused":
                raise ConfigError("no")
            return True

        return trial

    return Target(name="planted", what="", prepare=prepare, mutate=bytes_of, limit_s=1)


@pytest.mark.parametrize("data", _BREAKS, ids=bytes.decode)
def test_a_broken_promise_is_told_with_its_input(data: bytes) -> None:
    tally = try_all(_target(), [b"refused", data, b"right"])
    assert (tally.inputs, tally.refused, tally.answered) == (3, 1, 1)
    ((found, reason),) = [(broken.data, broken.reason) for broken in tally.broken]
    assert found == data
    assert reason.startswith(_BREAKS[data][1])


def test_memory_that_grows_is_told() -> None:
    tally = run(_target(), lambda number: b"grows" if number % 40 == 0 else b"", inputs=8000, seconds=None)
    assert [broken.reason.split(" by")[0] for broken in tally.broken] == ["memory grew"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_free_memory_of_the_heap_is_no_growth() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    size, count = 100_000, 1000

    def prepare() -> Trial:
        def trial(data: bytes) -> bool:
            if data == b"large":
                pieces = [ctypes.c_void_p(library.malloc(size)) for _ in range(count)]
                for piece in pieces:
                    ctypes.memset(piece, 1, size)
                # The last one stays, above all that is free.
                for piece in pieces[:-1]:
                    library.free(piece)
            return True

        return trial

    target = Target(name="planted", what="", prepare=prepare, mutate=bytes_of)
    tally = run(target, lambda number: b"large" if number == 3500 else b"", inputs=5000, seconds=None)
    assert tally.broken == []


def test_a_run_within_its_promises_counts_all() -> None:
    tally = run(_target(), lambda number: b"refused" if number % 2 else b"", inputs=5000, seconds=None)
    assert (tally.inputs, tally.refused, tally.answered, tally.broken) == (5000, 2500, 2500, [])
    assert about(tally.registers) == 2


def test_different_inputs_are_counted_beyond_a_child_that_ends() -> None:
    tally = try_all(_target(), [b"a", b"killed", b"a", b"b", b"killed", b"c"])
    assert about(tally.registers) == 4


def test_a_fault_of_the_trial_itself_is_no_finding() -> None:
    def prepare() -> Trial:
        raise KeyError("seed")

    target = Target(name="planted", what="", prepare=prepare, mutate=bytes_of)
    with pytest.raises(RuntimeError, match="KeyError: 'seed'"):
        try_all(target, [b""])


def test_inputs_are_those_of_their_seed() -> None:
    target = Target(name="planted", what="", prepare=_target().prepare, mutate=json_of)
    pool = [b'{"a":[1,"x",{"b":null}],"c":2}', b"[1,2]"]
    one, same, other = ([inputs_of(target, pool, seed)(n) for n in range(300)] for seed in (1, 1, 2))
    assert one == same
    assert one[:2] == other[:2] == pool
    assert one != other
    assert len(set(one)) > 200


def test_json_of_keeps_what_it_is_given() -> None:
    pool = (b'{"a":[1,"x",{"b":null}],"c":2}',)
    for seed in range(200):
        json_of(Random(seed), pool)
    assert json_of(Random(7), pool) == json_of(Random(7), pool)


def test_an_input_is_made_shorter_as_long_as_it_breaks_the_same_promise() -> None:
    def prepare() -> Trial:
        def trial(data: bytes) -> bool:
            if b"x" in data:
                raise Wrong("there is an x")
            return True

        return trial

    target = Target(name="planted", what="", prepare=prepare, mutate=bytes_of)
    (broken,) = try_all(target, [b"aaaaaaaaaaaaaxbbbbbbbbbbbbbb"]).broken
    assert smaller(target, broken) == b"x"
