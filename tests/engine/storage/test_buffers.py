"""Buffers: aligned, borrowed safely, never more than the pool may keep."""

from __future__ import annotations

import errno
import gc
import mmap
import weakref
from typing import Any

import numpy as np
import pytest

from pipeload.errors import LoadError
from pipeload.format.manifest import PAGE_BYTES, WeightSpec
from pipeload.format.pages import page_ceil, page_floor
from pipeload.storage import buffers
from pipeload.storage.buffers import Buffer, BufferPool, Part, tensor_in


def _out_of_memory(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (1, 1), (4096, 1), (4097, 2)])
def test_sizes_are_rounded_to_pages(nbytes: int, pages: int) -> None:
    assert page_ceil(nbytes) == pages * PAGE_BYTES
    assert Buffer(nbytes).nbytes == max(1, pages) * PAGE_BYTES


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 80])
def test_memory_that_the_system_does_not_have_is_named(nbytes: int) -> None:
    with pytest.raises(LoadError, match=rf"no memory for a buffer of {nbytes} bytes .*Lower the memory budget"):
        Buffer(nbytes)


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (4095, 0), (4096, 1), (8191, 1)])
def test_places_are_rounded_down_to_pages(nbytes: int, pages: int) -> None:
    assert page_floor(nbytes) == pages * PAGE_BYTES


def test_a_tensor_is_found_in_the_part_that_holds_it() -> None:
    # Three tensors of a range at byte 8192 of its file: two kept, one streamed, cut within a page.
    specs = [
        WeightSpec(name=str(k), dtype="float32", shape=(count,), offset=8192 + begin)
        for k, (begin, count) in enumerate([(0, 1000), (4000, 250), (5000, 1000)])
    ]
    parts = [Part(0, 5000, Buffer(5000)), Part(5000, 9000, Buffer(9000 - 4096))]
    for number, part in enumerate(parts):
        part.buffer.piece(0, part.buffer.nbytes)[:] = np.full(part.buffer.nbytes // 4, number, np.float32).tobytes()
    parts[1].buffer.piece(904, 908)[:] = np.float32(7).tobytes()
    arrays = [tensor_in(parts, spec, 8192) for spec in specs]
    assert [array.shape for array in arrays] == [(1000,), (250,), (1000,)]
    assert not arrays[0].any()
    assert not arrays[1].any()
    assert arrays[2].tolist() == [7, *[1] * 999]


def test_a_tensor_of_no_bytes_is_found_too() -> None:
    empty = WeightSpec(name="empty", dtype="float32", shape=(0, 4), offset=4096)
    assert tensor_in([Part(0, 0, Buffer(0))], empty, 4096).shape == (0, 4)


def test_buffers_begin_at_a_page() -> None:
    assert np.frombuffer(Buffer(10).piece(0, 10), np.uint8).ctypes.data % PAGE_BYTES == 0


def test_a_closed_buffer_gives_its_memory_back_even_while_arrays_live() -> None:
    buffer = Buffer(4096)
    array = buffer.array("float32", (1024,), 0)
    array[:] = 1
    buffer.close()
    # Zeros, never a dangling pointer.
    assert not array.any()


def test_a_buffer_of_locked_memory_is_closed_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(mmap.mmap):
        def madvise(self, advice: int, *rest: int) -> None:
            if advice == mmap.MADV_DONTNEED:
                raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(buffers.mmap, "mmap", Locked)
    buffer = Buffer(4096)
    array = buffer.array("float32", (1024,), 0)
    buffer.close()
    del array


def test_a_pool_reuses_buffers_and_keeps_no_more_than_planned() -> None:
    pool = BufferPool(PAGE_BYTES, keep=2)
    first, second, third = pool.take(), pool.take(), pool.take()
    closed = weakref.ref(first)
    pool.give(first)
    del first
    gc.collect()
    assert closed() is None, "there were three, and two are planned"
    pool.give(second)
    assert pool.take() is second
    pool.give(second)
    pool.give(third)
    assert {id(pool.take()), id(pool.take())} == {id(second), id(third)}


def test_a_closed_pool_starts_anew() -> None:
    pool = BufferPool(PAGE_BYTES, keep=1)
    used, idle = pool.take(), pool.take()
    pool.give(used)
    pool.close()
    pool.give(idle)
    assert pool.take() is idle


def test_a_pool_that_got_no_memory_counts_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BufferPool(PAGE_BYTES, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "Buffer", _out_of_memory)
        with pytest.raises(MemoryError):
            pool.take()
    buffer = pool.take()
    pool.give(buffer)
    assert pool.take() is buffer
