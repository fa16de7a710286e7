"""Weights of 16 bits become the same numbers in 32, wherever in a buffer they are read to."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest

from pipeload.format import pages
from pipeload.format.manifest import PAGE_BYTES, FileRecord, Shard, WeightSpec, WeightsRange
from pipeload.format.pages import memory_ceil, page_ceil, page_floor, room_bytes
from pipeload.format.placement import place
from pipeload.planning.layouts import staying
from pipeload.storage.buffers import Buffer, Part, tensor_in
from pipeload.storage.widening import widen, widened

_OFFSET = 3 * PAGE_BYTES


def test_every_bfloat16_keeps_its_bits() -> None:
    stored = np.arange(1 << 16, dtype=np.uint16).reshape(2, -1)
    wide = widened(stored, "bfloat16")
    assert wide.shape == stored.shape
    np.testing.assert_array_equal(wide.view(np.uint32), stored.astype(np.uint32) << 16)


def test_every_finite_float16_keeps_its_value() -> None:
    stored = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    stored = stored[np.isfinite(stored)]
    np.testing.assert_array_equal(widened(stored, "float16").view(np.uint32), stored.astype(np.float32).view(np.uint32))


def test_numbers_of_any_shape_are_widened() -> None:
    for shape in ((), (0,), (3, 0, 2), (1,), (5, 7), ((1 << 17) + 3,)):
        stored = np.full(shape, 0x3F80, np.uint16)
        np.testing.assert_array_equal(widened(stored, "bfloat16"), np.ones(shape, np.float32))


def _shard(specs: Sequence[tuple[str, int, bool]]) -> Shard:
    """A shard with a tensor of each type and number of elements, which is widened or not."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "bool": 1}
    tensors, at = [], _OFFSET
    for number, (dtype, count, wide) in enumerate(specs):
        tensors.append(
            WeightSpec(
                name=f"t{number}", dtype=dtype, shape=(count,), offset=at, widened=f"w{number}" if wide else None
            )
        )
        at += sizes[dtype] * count
    graph = FileRecord(path="g", nbytes=1, sha256="0" * 64)
    weights = WeightsRange(path="w", offset=_OFFSET, nbytes=at - _OFFSET, sha256="0" * 64)
    return Shard(
        name="s",
        role="block",
        graph=graph,
        weights=weights,
        tensors=tuple(tensors),
        inputs=(),
        outputs=(),
        structure="s",
    )


def _random_shard(random: np.random.Generator) -> Shard:
    specs = []
    for _ in range(random.integers(1, 9)):
        dtype = str(random.choice(["float32", "bfloat16", "bfloat16", "float16", "float16", "bool"]))
        count = int(
            random.choice([0, 1, 2, 30, 500, 2048, 5000, 200_000], p=[0.05, 0.1, 0.1, 0.2, 0.2, 0.1, 0.2, 0.05])
        )
        specs.append((dtype, 4 * count, dtype.endswith("16") and bool(random.random() < 0.9)))
    specs.sort(key=lambda spec: {"float32": 0, "bfloat16": 1, "float16": 1, "bool": 2}[spec[0]])
    specs.append(("bfloat16", 64, True))
    return _shard(sorted(specs, key=lambda spec: {"float32": 0, "bool": 2}.get(spec[0], 1)))


def _read(shard: Shard, content: bytes, begin: int, end: int, buffer: Buffer, read_at: int) -> None:
    """As the storage reads it: from the page in which it begins, to the end of the page in which it ends."""
    pieces = content[page_floor(begin) : page_ceil(end)]
    buffer.piece(read_at, read_at + len(pieces))[:] = pieces


@pytest.mark.parametrize("page_bytes", [4096, 65536])
@pytest.mark.parametrize("seed", range(40))
def test_tensors_are_right_wherever_a_part_begins_and_ends(
    seed: int, page_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_MEMORY_PAGE_BYTES", page_bytes)
    random = np.random.default_rng(seed)
    shard = _random_shard(random)
    assert shard.weights is not None
    values: dict[str, Any] = {}
    content = bytearray()
    for spec in shard.tensors:
        raw = random.integers(0, 31744, prod(spec.shape), dtype=np.uint16)
        stored = raw if spec.dtype == "bfloat16" else raw.view(np.float16) if spec.dtype == "float16" else None
        if stored is None:
            stored = raw.astype(spec.dtype)
        content += stored.tobytes()
        values[spec.name] = widened(stored, spec.dtype) if spec.widened else stored
    places = sorted({spec.offset - _OFFSET for spec in shard.tensors} | {shard.nbytes})
    ranges = [(0, 0), *((begin, end) for begin in places for end in places if begin < end)]
    for streamed in [ranges[k] for k in random.choice(len(ranges), min(len(ranges), 6), replace=False)]:
        placement = place(shard, streamed)
        buffer = Buffer(placement.nbytes)
        assert buffer.nbytes == placement.nbytes == memory_ceil(placement.nbytes)
        assert placement.read_at % PAGE_BYTES == 0
        parts = [Part(*streamed, buffer, placement)]
        parts += [Part(*part, Buffer(room_bytes(*part))) for part in staying(shard, streamed)]
        for part in parts:
            _read(shard, bytes(content), part.begin, part.end, part.buffer, part.placement.read_at)
        widen(shard, parts)
        for spec in shard.tensors:
            found = tensor_in(parts, spec, _OFFSET)
            np.testing.assert_array_equal(found, values[spec.name], err_msg=f"{spec} of {streamed}")
        # Kept parts are as they were: the next pass takes them again.
        for part in parts[1:]:
            kept = bytes(part.buffer.piece(0, len(content[page_floor(part.begin) : page_ceil(part.end)])))
            assert kept == bytes(content[page_floor(part.begin) : page_ceil(part.end)])


def test_bytes_that_nothing_widens_stay_where_they_are_read() -> None:
    shard = _shard([("float32", 4096, False), ("bfloat16", 100, False)])
    for streamed in ((0, shard.nbytes), (0, 4 * 4096)):
        placement = place(shard, streamed)
        assert (placement.nbytes, placement.read_at, placement.places) == (room_bytes(*streamed), 0, {})


def test_a_buffer_is_little_larger_than_what_it_holds() -> None:
    shard = _shard([("bfloat16", 1 << 20, True), ("float32", 100, False)])
    assert shard.memory_bytes == (4 << 20) + 400
    assert place(shard, (0, shard.nbytes)).nbytes <= shard.memory_bytes + 4 * PAGE_BYTES
    assert place(shard, (0, 0)).nbytes <= shard.memory_bytes + 4 * PAGE_BYTES
