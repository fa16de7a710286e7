"""Inputs by the million: a forked process reads one after another, and its parent watches it.

```
 parent                                    child, forked with everything imported; RLIMIT_AS bounds its memory
 reads number and begin of the input  <--  shared pages: number, begin, refusals, answers ...
 too late: SIGKILL, and the next child goes on behind this input
 takes what broke a promise           <--  pipe: number, reason
```
Input `number` of a seed is the same in every run over the same corpus.
"""

from __future__ import annotations

import faulthandler
import gc
import mmap
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import psutil
from tests.fuzz.sketch import REGISTERS, note
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.errors import PipeloadError
from pipeload.machine import heap

__all__ = ["Broken", "Tally", "checked", "input_of", "inputs_of", "run", "try_all"]

_PAGE = struct.Struct("<qddqqddqq")
"""Number of the input; when it began, and by processor time; refusals, answers; the longest seconds, their number; RSS
early and late."""
_LOOK_S = 0.1
_MEMORY = "/dev/shm"
"""Where files of inputs lie."""
_PATIENCE = 20
"""An input that waits for something has this many times its seconds."""
_GROWTH_BYTES, _GROWTH_FROM = 48 << 20, 2000
_FAILED = 70
"""The status of a child that could not go on by a fault of the tests."""
_MOST_BROKEN = 20
"""Of one reason; a run with this many of all ends."""


@dataclass(frozen=True, kw_only=True)
class Broken:
    """An input that broke a promise.

    Attributes:
        data: the input; None where no single one did it.
        reason: in one line; inputs with the same one have the same cause.
        detail: the traceback, where there is one.
    """

    data: bytes | None
    reason: str
    detail: str = ""


@dataclass(kw_only=True)
class Tally:
    """What a run has tried.

    Attributes:
        inputs: of these, `refused` and `answered` as they should be.
        seconds: of the whole run.
        slowest_s, slowest: the most processor time of an input, and its number.
        peak_bytes: the most memory of the process, interpreter and libraries included.
        covered: places of the code that were reached; 0 where that was not measured.
        broken: inputs that broke a promise, at most 20 of each reason.
        registers: of the different inputs, see `sketch`.
    """

    inputs: int = 0
    refused: int = 0
    answered: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest: int = -1
    peak_bytes: int = 0
    covered: int = 0
    broken: list[Broken] = field(default_factory=list)
    registers: bytes = bytes(REGISTERS)


def input_of(target: Target, pool: Sequence[bytes], seed: int, number: int) -> bytes:
    """One input: a known one first, each once, then mutated ones."""
    return pool[number] if number < len(pool) else target.mutate(Random(seed << 48 | number), pool)


def inputs_of(target: Target, pool: Sequence[bytes], seed: int, *, first: int = 0) -> Callable[[int], bytes]:
    """Number -> input, from the input with the number `first` on."""
    return lambda number: input_of(target, pool, seed, first + number)


def run(target: Target, make: Callable[[int], bytes], *, inputs: int | None, seconds: float | None) -> Tally:
    """Try the inputs 0, 1, 2 ... until there were as many, or for as long.

    Args:
        target: reads them.
        make: number -> input.
        inputs: how many; None for no limit.
        seconds: how long they may take, without the time in which children get ready; None for no limit.
    """
    tally, begun = Tally(), time.monotonic()
    first, last = 0, sys.maxsize if inputs is None else inputs
    left_s = float("inf") if seconds is None else seconds
    reasons: dict[str, int] = {}
    memory = _MEMORY if Path(_MEMORY).is_dir() else None
    while first < last and left_s > 0 and sum(reasons.values()) < 5 * _MOST_BROKEN:
        with tempfile.TemporaryDirectory(prefix="pipeload-fuzz-", dir=memory) as folder:
            first, took_s = _one_child(target, make, first, last, left_s, tally, reasons, folder)
        left_s -= took_s
    tally.seconds = time.monotonic() - begun
    return tally


def try_all(target: Target, inputs: Sequence[bytes]) -> Tally:
    """Try these inputs."""
    return run(target, inputs.__getitem__, inputs=len(inputs), seconds=None)


def _one_child(
    target: Target,
    make: Callable[[int], bytes],
    first: int,
    last: int,
    left_s: float,
    tally: Tally,
    reasons: dict[str, int],
    folder: str,
) -> tuple[int, float]:
    """Fork a child and wait for its end; returns the number of the next input, and the seconds since the first."""
    page = mmap.mmap(-1, mmap.PAGESIZE + REGISTERS)
    page[mmap.PAGESIZE :] = tally.registers
    _PAGE.pack_into(page, 0, first, 0.0, 0.0, 0, 0, 0.0, -1.0, 0, 0)
    taking, giving = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(taking)
        tempfile.tempdir = folder
        _read_all(target, make, first, last, left_s, page, giving)
    os.close(giving)
    late, said, begun = False, b"", 0.0
    ended = select.poll()
    ended.register(taking, select.POLLIN)
    while True:
        if ended.poll(_LOOK_S * 1000):
            piece = os.read(taking, 1 << 16)
            if not piece:
                break
            said += piece
        number, began, used_s, *_ = _PAGE.unpack_from(page)
        begun = begun or began
        if began and not late and _is_late(child, target.limit_s, began, used_s):
            late = True
            os.kill(child, signal.SIGKILL)
    os.close(taking)
    took_s = time.monotonic() - begun if begun else 0.0
    _, status, used = os.wait4(child, 0)
    number, began, _, refused, answered, slowest_s, slowest, early, grown = _PAGE.unpack_from(page)
    tally.registers = page[mmap.PAGESIZE :]
    tally.inputs += number - first
    tally.refused += refused
    tally.answered += answered
    tally.peak_bytes = max(tally.peak_bytes, used.ru_maxrss * 1024)
    if slowest_s > tally.slowest_s:
        tally.slowest_s, tally.slowest = slowest_s, int(slowest)
    for broken_at, reason, detail in _messages(said):
        if not reason:
            raise RuntimeError(f"The trial of {target.name} failed by itself:\n{detail}")
        reasons[reason] = reasons.get(reason, 0) + 1
        if reasons[reason] <= _MOST_BROKEN:
            tally.broken.append(Broken(data=make(broken_at), reason=reason, detail=detail))
    if status == 0:
        if early and grown - early > _GROWTH_BYTES:
            reason = f"memory grew by {(grown - early) >> 20} MiB over {number - first} inputs"
            tally.broken.append(Broken(data=None, reason=reason))
        return number, took_s
    # The child ended within an input, which counts, and the next one goes on behind it.
    if began == 0:
        raise RuntimeError(f"The child for {target.name} ended before its first input, with status {status}.")
    tally.inputs += 1
    if late:
        reason = f"it took more than {target.limit_s:.0f} s"
    elif os.WIFSIGNALED(status):
        reason = f"it ended the process by {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        reason = f"it ended the process with status {os.waitstatus_to_exitcode(status)}"
    reasons[reason] = reasons.get(reason, 0) + 1
    if reasons[reason] <= _MOST_BROKEN:
        tally.broken.append(Broken(data=make(number), reason=reason))
    return number + 1, took_s


def _is_late(child: int, limit_s: float, began: float, used_s: float) -> bool:
    """Whether an input takes too long, of the processor or altogether: other work on the machine does not count."""
    waited_s = time.monotonic() - began
    if waited_s < limit_s:
        return False
    times = psutil.Process(child).cpu_times()
    return times.user + times.system - used_s > limit_s or waited_s > _PATIENCE * limit_s


def _messages(said: bytes) -> Iterator[tuple[int, str, str]]:
    at = 0
    while at + 4 <= len(said):
        size = int.from_bytes(said[at : at + 4], "little")
        if at + 4 + size > len(said):
            return
        yield pickle.loads(said[at + 4 : at + 4 + size])
        at += 4 + size


def _read_all(
    target: Target, make: Callable[[int], bytes], first: int, last: int, left_s: float, page: Any, giving: int
) -> NoReturn:
    """The child: reads until it has all, or is killed."""
    status = _FAILED
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        faulthandler.disable()
        if not os.environ.get("PIPELOAD_FUZZ_LOUD"):
            os.dup2(quiet, 2)
        trial = target.prepare()
        gc.collect()
        gc.freeze()
        with checked(target) as check:
            _loop(target, make, first, last, time.monotonic() + left_s, page, giving, trial, check)
        status = 0
    except BaseException:  # noqa: BLE001 - a child must end here
        _tell(giving, (0, "", traceback.format_exc()))
    finally:
        os._exit(status)


def _tell(giving: int, message: tuple[int, str, str]) -> None:
    data = pickle.dumps(message)
    os.write(giving, len(data).to_bytes(4, "little") + data)


@contextmanager
def checked(target: Target) -> Iterator[Callable[[Trial, bytes], tuple[bool, str, str]]]:
    """A context with bounded memory, and what tries an input in it: whether it was answered, the broken promise."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + target.memory_bytes, before[1]))

    def check(trial: Trial, data: bytes) -> tuple[bool, str, str]:
        try:
            return trial(data), "", ""
        except PipeloadError as error:
            # One that was wrapped is a refusal in form, and memory without a bound in fact.
            cause = error.__cause__
            unbounded = isinstance(cause, MemoryError) and not isinstance(cause, PipeloadError)
            return False, _reason(error, cause) if unbounded else "", ""
        except Wrong as wrong:
            return False, f"wrong: {wrong.rule}", f"{wrong.detail[:1000]}\n"
        except BaseException as error:  # noqa: BLE001 - panics too
            return False, _reason(error, error), traceback.format_exc(limit=-12)

    try:
        yield check
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _reason(error: BaseException, cause: BaseException | None) -> str:
    """A foreign exception and where it came from, without what differs from input to input."""
    places = [f for f in traceback.extract_tb(error.__traceback__) if "/pipeload" in f.filename] or ["?"]
    place = places[-1]
    where = place if isinstance(place, str) else f"{Path(place.filename).name}, {place.name}"
    return f"{type(cause).__name__} in {where}"


def _loop(
    target: Target,
    make: Callable[[int], bytes],
    first: int,
    last: int,
    until: float,
    page: Any,
    giving: int,
    trial: Trial,
    check: Callable[[Trial, bytes], tuple[bool, str, str]],
) -> None:
    refused = answered = early = grown = 0
    parent = os.getppid()
    slowest_s, slowest, told = 0.0, -1.0, 0
    used_s, number = time.process_time(), first
    registers = memoryview(page)[mmap.PAGESIZE :]
    for number in range(first, last):
        if (now := time.monotonic()) > until:
            break
        _PAGE.pack_into(page, 0, number, now, used_s, refused, answered, slowest_s, slowest, early, grown)
        data = make(number)
        note(registers, data)
        right, reason, detail = check(trial, data)
        before_s, used_s = used_s, time.process_time()
        if used_s - before_s > slowest_s:
            slowest_s, slowest = used_s - before_s, float(number)
        if right:
            answered += 1
        else:
            refused += not reason
        if reason and told < 20 * _MOST_BROKEN:
            told += 1
            _tell(giving, (number, reason, detail))
        if (number - first) % 1000 == 999:
            if os.getppid() != parent:
                return
            # Free memory that the heap keeps, after one large image for instance, is no growth.
            heap.trim()
            grown = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
            early = early or (grown if number - first > _GROWTH_FROM else 0)
    else:
        number = last
    _PAGE.pack_into(page, 0, number, 0.0, 0.0, refused, answered, slowest_s, slowest, early, grown)
