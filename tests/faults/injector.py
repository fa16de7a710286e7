"""One injector: it counts events of one kind at the boundary to the system and to libraries, and lets the n-th fail.

The names that are replaced are the lowest ones that Python code calls: `os.preadv`, `os.open`, `mmap.mmap`, the start
of a thread, the raw file under `open`, the session of onnxruntime. An event counts when code of the product has caused
it, directly or through a library; imports of modules do not count.
"""

from __future__ import annotations

import builtins
import dis
import errno
import fcntl
import io
import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from numpy._core._exceptions import _ArrayMemoryError
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

__all__ = ["FAULTS", "KINDS", "CallersOwn", "Injector", "interrupted", "live_maps", "patched"]

_ROOT = Path(__file__).resolve().parents[2]
_PRODUCT = tuple(str(_ROOT / folder) + os.sep for folder in ("engine/pipeload", "exporter/pipeload_export"))
_TESTS = str(_ROOT / "tests") + os.sep

FAULTS: Mapping[str, tuple[str, ...]] = {
    "open": ("EMFILE", "EIO", "ENOMEM"),
    "read": ("EIO", "ENOMEM", "short", "zero"),
    "stat": ("EIO",),
    "control": ("EIO",),
    "write": ("ENOSPC", "EIO"),
    "sync": ("EIO",),
    "name": ("ENOSPC", "EIO"),
    "allocation": ("no memory",),
    "thread": ("no thread",),
    "process": ("EAGAIN",),
    "session": ("no memory", "no thread"),
    "run": ("failed", "no memory"),
    "callback": ("raises",),
    "interrupt": ("Ctrl-C",),
}
"""Kind of event -> the ways in which it fails."""
KINDS = tuple(FAULTS)


class CallersOwn(Exception):  # noqa: N818 - stands for any exception of a caller
    """Raised by a callback: it must come back as it is."""


@dataclass(slots=True, kw_only=True)
class Injector:
    """Lets the n-th event of a kind fail, in one way.

    Attributes:
        kind: of `FAULTS`; empty counts the events of all kinds.
        fault: one of its ways.
        at: which event, from 1.
        armed: events count, and the n-th fails.
        counts: events so far.
        error: the exception that was raised; None for a read that was short, or before that.
        fired: the n-th event has come.
        place: where it came.
        looks: instruction at which the kind `interrupt` has come -> number of its first event there, and of its last.
    """

    kind: str = ""
    fault: str = ""
    at: int = 0
    armed: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    error: BaseException | None = None
    fired: bool = False
    place: str = ""
    looks: dict[tuple[CodeType, int], tuple[int, int]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def disarm(self) -> None:
        """From now on nothing fails, and nothing counts."""
        with self._lock:
            self.armed = False

    def event(self, kind: str, path: object = None, *, frame: FrameType | None = None) -> str | None:
        """Count an event. Returns the fault where it is the n-th and no exception; raises its exception otherwise."""
        if self.kind not in ("", kind) or not self.armed:
            return None
        place = _place(frame or sys._getframe(2)) if kind != "callback" else "callback"
        if not place:
            return None
        with self._lock:
            if not self.armed:
                return None
            self.counts[kind] += 1
            if kind == "interrupt" and frame is not None:
                key, number = (frame.f_code, frame.f_lasti), self.counts[kind]
                self.looks[key] = (self.looks.get(key, (number, number))[0], number)
            if not self.kind or self.counts[kind] != self.at:
                return None
            self.fired, self.place = True, place
            self.error = self._made(path)
        if self.error is None:
            return self.fault
        raise self.error

    def _made(self, path: object) -> BaseException | None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None
        match self.kind, self.fault:
            case _, "short" | "zero":
                return None
            case "allocation", _:
                return _system("ENOMEM") if name else _ArrayMemoryError((1 << 20,), np.dtype("u1"))
            case "session" | "run", "no memory":
                return RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory")
            case "session", _:
                return RuntimeException("pthread_create failed, error code: 11 error msg: unavailable")
            case "run", _:
                return RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned")
            case "thread", _:
                return RuntimeError("can't start new thread")
            case "callback", _:
                return CallersOwn("a callback of the caller")
            case "interrupt", _:
                return KeyboardInterrupt()
            case _:
                return _system(self.fault, name)


def _system(name: str, path: str | None = None) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


@contextmanager
def interrupted(injector: Injector) -> Iterator[None]:
    """A context in which each place where the interpreter looks at signals is an event of the kind `interrupt`.

    Of the product's code that this thread runs. CPython does not look between any two lines: it does so where a
    function begins or a generator goes on, after a call of what is not written in Python, and where a loop goes
    back. So it never leaves a `with` over a lock without the lock's end, but it may lose what a call has returned.
    """
    entered: set[int] = set()

    def call(frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if frame.f_back is not None and code.co_name not in _CONSTRUCTORS and code.co_filename != __file__:
            entered.add(id(frame.f_back))
        if not is_product(code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        looks, before = _looks_of(code), -1

        def opcode(frame: FrameType, event: str, _: object) -> Any:
            nonlocal before
            if event == "opcode":
                at, before_it = frame.f_lasti, before
                before = at
                if at in looks.calls:
                    entered.discard(id(frame))
                elif (
                    at in looks.starts
                    or (before_it in looks.jumps and at < before_it)
                    or (looks.after.get(at) == before_it and id(frame) not in entered)
                ):
                    injector.event("interrupt", frame=frame)
            return opcode

        return opcode

    if injector.kind not in ("", "interrupt"):
        yield
        return
    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


_CONSTRUCTORS = ("__init__", "__new__")
"""Called by the interpreter's own code, after which it looks at signals; after other Python code it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looks:
    """Where the interpreter looks at signals in a function: offsets of its instructions.

    Attributes:
        starts: where it begins, or goes on after a `yield`.
        calls: its calls.
        jumps: from where loops go back.
        after: instruction behind a call -> that call, where both are in the same `try` or `with`.
    """

    starts: frozenset[int]
    calls: frozenset[int]
    jumps: frozenset[int]
    after: Mapping[int, int]


@cache
def _looks_of(code: CodeType) -> _Looks:
    starts, calls, jumps = set[int](), set[int](), set[int]()
    after: dict[int, int] = {}
    handlers = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined] # not in its stubs

    def handler(offset: int) -> object:
        return next((one.target for one in handlers if one.start <= offset < one.end), None)

    latest: int | None = None
    for step in dis.get_instructions(code):
        if latest is not None and handler(latest) == handler(step.offset):
            after[step.offset] = latest
        latest = None
        if step.opname == "RESUME" and (step.arg or 0) & 3 < 2:
            starts.add(step.offset)
        elif step.opname in ("CALL", "CALL_KW", "CALL_FUNCTION_EX"):
            calls.add(step.offset)
            latest = step.offset
        elif "JUMP_BACKWARD" in step.opname and "NO_INTERRUPT" not in step.opname:
            jumps.add(step.offset)
    return _Looks(starts=frozenset(starts), calls=frozenset(calls), jumps=frozenset(jumps), after=after)


def is_product(path: str) -> bool:
    """Whether a file of code is one of the product."""
    return path.startswith(_PRODUCT)


def _place(frame: FrameType | None) -> str:
    """The nearest line of the product that has caused an event; empty where it was none, or an import."""
    while frame is not None:
        path = frame.f_code.co_filename
        if is_product(path):
            return f"{Path(path).relative_to(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        if path != __file__ and path.startswith(("<frozen importlib", _TESTS)):
            return ""
        frame = frame.f_back
    return ""


class _Map(mmap.mmap):
    """Memory of a buffer, known as long as it lives."""

    def __new__(cls, *arguments: Any, **options: Any) -> _Map:
        made = super().__new__(cls, *arguments, **options)
        _MAPS.add(made)
        return made

    __hash__ = object.__hash__


_MAPS: weakref.WeakSet[_Map] = weakref.WeakSet()


def live_maps() -> list[int]:
    """Sizes of the buffers that were not closed."""
    return [len(one) for one in list(_MAPS) if not one.closed]


class _Raw(io.FileIO):
    """The raw file under `open`."""

    injector: Injector

    def readinto(self, buffer: Any) -> int | None:
        fault = self.injector.event("read", self.name)
        view = memoryview(buffer).cast("B")
        return 0 if fault == "zero" else super().readinto(view[: (len(view) + 1) // 2] if fault else view)

    def readall(self) -> bytes:
        pieces: list[bytes] = []
        while piece := self.read(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)

    def read(self, size: int | None = -1) -> Any:
        if size is None or size < 0:
            return self.readall()
        fault = self.injector.event("read", self.name)
        return b"" if fault == "zero" else super().read((size + 1) // 2 if fault and size else size)

    def write(self, data: Any) -> Any:
        self.injector.event("write", self.name)
        return super().write(data)


@contextmanager
def patched(injector: Injector) -> Iterator[None]:
    """A context in which the boundary goes through the injector."""
    with ExitStack() as stack:

        def replace(owner: Any, name: str, made: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, made))

        def before(owner: Any, name: str, kind: str, *, named: bool = True) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                injector.event(kind, arguments[0] if named and arguments else None)
                return real(*arguments, **options)

            replace(owner, name, call)

        for name in ("rename", "replace", "mkdir", "link"):
            before(os, name, "name")
        for name in ("stat", "lstat", "fstat"):
            before(os, name, "stat")
        for name in ("fcntl", "flock"):
            before(fcntl, name, "control", named=False)
        before(os, "posix_fadvise", "control", named=False)
        before(os, "fsync", "sync", named=False)
        for name in ("write", "pwrite", "ftruncate"):
            before(os, name, "write", named=False)
        before(os, "open", "open")
        before(threading, "_start_new_thread", "thread", named=False)
        before(subprocess, "_fork_exec", "process", named=False)
        for name in ("empty", "zeros", "ones", "full", "concatenate", "stack", "ascontiguousarray"):
            before(np, name, "allocation", named=False)
        replace(os, "read", _reading(injector, os.read))
        replace(os, "pread", _reading(injector, os.pread))
        replace(os, "preadv", _reading_into(injector, os.preadv))
        opening = _opening(injector, builtins.open)
        replace(builtins, "open", opening)
        replace(io, "open", opening)

        class Map(_Map):
            def __new__(cls, *arguments: Any, **options: Any) -> Map:
                injector.event("allocation", "a buffer")
                made: Map = super().__new__(cls, *arguments, **options)
                return made

            __hash__ = object.__hash__

        replace(mmap, "mmap", Map)

        session = ort.InferenceSession

        class Session(session):  # type: ignore[misc,valid-type]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                injector.event("session")
                super().__init__(*arguments, **options)

        for name in ("run", "run_with_ort_values", "run_with_iobinding"):
            setattr(Session, name, _running(injector, getattr(session, name)))
        replace(ort, "InferenceSession", Session)
        yield


def _running(injector: Injector, real: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        injector.event("run")
        return real(*arguments, **options)

    return run


def _reading(injector: Injector, real: Callable[..., bytes]) -> Callable[..., bytes]:
    def read(descriptor: int, size: int, *rest: Any) -> bytes:
        fault = injector.event("read")
        return b"" if fault == "zero" else real(descriptor, (size + 1) // 2 if fault else size, *rest)

    return read


def _reading_into(injector: Injector, real: Callable[..., int]) -> Callable[..., int]:
    def read(descriptor: int, buffers: Any, offset: int, *rest: Any) -> int:
        fault = injector.event("read")
        if fault == "zero":
            return 0
        if fault:
            # Half of it, as a disk does that has met a signal: the rest of the memory keeps what it had.
            return _half(real, descriptor, memoryview(buffers[0]).cast("B"), offset)
        return real(descriptor, buffers, offset, *rest)

    return read


def _half(real: Callable[..., int], descriptor: int, view: memoryview, offset: int) -> int:
    wanted = (len(view) + 1) // 2
    held = bytes(view[wanted:])
    count = min(real(descriptor, [view], offset), wanted)
    view[wanted:] = held
    return count


def _opening(injector: Injector, real: Callable[..., Any]) -> Callable[..., Any]:
    def opening(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        injector.event("open", file)
        counts = injector.armed and injector.kind in ("", "read", "write") and _place(sys._getframe(1))
        if buffering != -1 or not counts:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.injector = injector
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else None
        if buffer is None:
            buffer = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    return opening
