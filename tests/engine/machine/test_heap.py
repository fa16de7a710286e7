"""The heap gives memory back where the C library can be told to."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import EMULATED, run_python

from pipeload.machine import heap

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc"
)


def test_limiting_the_heap_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise OSError("no C library")

    monkeypatch.setattr(heap.ctypes, "CDLL", refuse)
    monkeypatch.setattr(heap, "_limited", False)
    heap.limit_heap()
    with heap.reused():
        pass


def test_large_blocks_come_from_the_heap_only_inside_of_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two threads make sessions at the same time."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_limited", True)
    monkeypatch.setattr(heap, "_set_option", lambda option, value: not told.append((option, value)))
    with heap.reused():
        with heap.reused():
            assert dict(told)[heap._M_MMAP_THRESHOLD] > 1 << 29
        assert dict(told)[heap._M_MMAP_THRESHOLD] > 1 << 29
    assert dict(told)[heap._M_MMAP_THRESHOLD] == 128 << 10


def test_nothing_is_set_where_the_heap_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library keeps large blocks by itself then, and any setting would end that."""
    monkeypatch.setattr(heap, "_limited", False)
    monkeypatch.setattr(heap, "_set_option", lambda *_: pytest.fail("a setting was changed"))
    with heap.reused():
        pass


def test_trimming_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.trim()
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.trim()


def test_the_c_librarys_own_allocator_is_no_foreign_one() -> None:
    """Python on aarch64 has an entry of its own for malloc, which was taken for another allocator."""
    assert heap.foreign_allocator() is None


_THREADS = """
import threading
from pipeload.machine import heap

def start(count):
    barrier = threading.Barrier(count)
    def work():
        barrier.wait()
        return [bytearray(2000) for _ in range(100)]
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@needs_glibc
@pytest.mark.parametrize("early", [True, False])
def test_threads_share_one_arena_where_it_was_asked_for_before_they_began(early: bool) -> None:
    """Where it was not, the heap knows that it is scattered, and that no more arenas come."""
    before = "heap.one_arena()" if early else ""
    program = f"{_THREADS}{before}\nstart(4)\nheap.limit_heap()\nhad = heap._arenas()\nstart(8)\n"
    had, has, scattered = run_python(f"{program}print(had, heap._arenas(), heap.is_scattered())").stdout.split()
    assert (had == has == "1") if early else (had == has and int(had) > 1)
    assert scattered == str(not early)


@needs_glibc
def test_commands_have_one_arena() -> None:
    program = """
import sys
from pipeload.__main__ import main
sys.argv = ["pipeload", "--version"]
try:
    main()
except SystemExit:
    pass
start(4)
heap.limit_heap()
print(heap._arenas())
"""
    assert run_python(_THREADS + program).stdout.split()[-1] == "1"


@needs_glibc
@pytest.mark.skipif(EMULATED, reason="the compiler is that of the host")
def test_a_preloaded_allocator_is_refused(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps freed memory by rules of its own: no budget can be kept."""
    if ".so" not in Path(heap._file_of("malloc")).name:
        pytest.skip("this interpreter hides where malloc leads to")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    code, library = tmp_path / "own.c", tmp_path / "libown.so"
    source = "extern void *__libc_malloc(unsigned long); void *malloc(unsigned long n) { return __libc_malloc(n); }"
    source += "int mallopt(int option, int value) { return 1; }"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    program = f"""
import pipeload
try:
    pipeload.load({str(toy)!r})
except pipeload.LoadError as error:
    print(error)
"""
    monkeypatch.setenv("LD_PRELOAD", str(library))
    said = run_python(program).stdout
    assert said.startswith("libown.so stands in for the memory allocator of the C library")
    assert "LD_PRELOAD" in said
