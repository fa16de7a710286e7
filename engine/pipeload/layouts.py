"""Ways to use the memory that is left for weights: what stays, what is streamed, through how many buffers. Pure.

Resident shards are spread evenly among the streamed ones, so that reading never pauses: in the order of van der
Corput's sequence, small ones first. Of the others the first tensors stay, as far as memory goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from pipeload.buffers import page_ceil, page_floor
from pipeload.manifest import Shard
from pipeload.speed import Speed

__all__ = ["Layout", "layouts", "session_bytes"]

_SESSION_BYTES = 300_000
_THREAD_BYTES = 50_000
_SMALL_SHARE = 0.1
"""A shard below this part of the largest is made resident first: it saves a session, and costs next to nothing."""
_TINY_SHARE = 0.02
"""The beginning of a shard that is kept, and the rest, are at least this part of it."""
_BUFFER_SIZES = 12
"""Most sizes of a buffer that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to use the memory that is left for weights."""

    loaders: int = 1
    buffers: int
    buffer_bytes: int
    resident: frozenset[str]
    kept: dict[str, int]
    packed: bool
    packed_streamed: bool
    packing_bytes: int
    used_bytes: int
    streamed_bytes: int
    threads: int = 1


def session_bytes(threads: int) -> int:
    """One session with so many intra-op threads, beside its weights: graph, kernels, thread pool."""
    return _SESSION_BYTES + _THREAD_BYTES * threads


def layouts(shards: Sequence[Shard], free: int, speed: Speed, loaders: int | None) -> Iterator[Layout]:
    """Every layout that is worth a look and fits into `free` bytes."""
    order = _residence_order(shards)
    counts = [loaders] if loaders else speed.loaders
    sizes = _buffer_sizes(shards)
    slots = [(count, buffers, size) for count in counts for buffers in range(1, count + 2) for size in sizes]
    slots += [(count, 0, 0) for count in counts]
    for threads in sorted(speed.times, reverse=True):
        each = session_bytes(threads)
        # Where it pays there may yet be no memory for the packed copies.
        ways = (False, True) if speed.packing_streamed_pays(threads) else (False,)
        for packed, pack_streamed in product((False, True), ways):
            for count, buffers, size in slots:
                layout = _fill(shards, order, free, buffers, size, each, packed=packed, pack_streamed=pack_streamed)
                if layout is not None:
                    yield replace(layout, loaders=count, threads=threads)


def _fill(
    shards: Sequence[Shard],
    order: Sequence[Shard],
    free: int,
    buffers: int,
    buffer_bytes: int,
    session_bytes: int,
    *,
    packed: bool,
    pack_streamed: bool,
) -> Layout | None:
    """Fill the memory beside the buffers with what need not be read again; None when the layout does not fit."""
    packing = max(_packing_bytes(shard) for shard in shards) + session_bytes if packed else 0
    copy_bytes = buffer_bytes if pack_streamed else 0
    used = packing + buffers * (buffer_bytes + copy_bytes + session_bytes)
    # The packed copy of a streamed shard takes memory for all of it.
    places = {shard.name: [0] if pack_streamed else _places(shard) for shard in shards}
    kept: dict[str, int] = {}
    for shard in shards:
        # No more may be streamed of a shard than a buffer holds.
        least = next((p for p in places[shard.name] if _streamed_bytes(shard, p) <= buffer_bytes), shard.nbytes)
        if shard.nbytes == 0 and not buffers:
            least = 0
        kept[shard.name] = least
        used += page_ceil(least)
    whole = {shard.name for shard in shards if not buffers or (kept[shard.name] == shard.nbytes and shard.nbytes)}
    used += len(whole) * session_bytes
    if used > free:
        return None
    for shard in order:
        extra = page_ceil(shard.nbytes) - page_ceil(kept[shard.name]) + session_bytes
        if shard.name not in whole and used + extra <= free:
            whole.add(shard.name)
            used += extra
    for shard in order:
        if shard.name in whole:
            continue
        more = [p for p in places[shard.name] if used + page_ceil(p) - page_ceil(kept[shard.name]) <= free]
        if more and more[-1] > kept[shard.name]:
            used += page_ceil(more[-1]) - page_ceil(kept[shard.name])
            kept[shard.name] = more[-1]
    streamed = [shard for shard in shards if shard.name not in whole]
    if bool(buffers) != bool(streamed) or buffers > len(streamed):
        return None
    parts = {shard.name: kept[shard.name] for shard in streamed if kept[shard.name]}
    return Layout(
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        resident=frozenset(whole),
        kept=parts,
        packed=packed,
        packed_streamed=pack_streamed and bool(streamed),
        packing_bytes=packing,
        used_bytes=used,
        streamed_bytes=sum(shard.nbytes - parts.get(shard.name, 0) for shard in streamed),
    )


def _places(shard: Shard) -> list[int]:
    """Bytes of a shard that may be kept while the rest is streamed: whole tensors, in the order of the file."""
    if shard.weights is None:
        return [0]
    # Tiny tensors at the end of a shard are not worth a place of their own.
    step = shard.nbytes * _TINY_SHARE
    places = [0]
    for spec in shard.tensors:
        place = spec.offset - shard.weights.offset
        if place - places[-1] >= step and shard.nbytes - place >= step:
            places.append(place)
    return places


def _streamed_bytes(shard: Shard, kept: int) -> int:
    """What a buffer must hold of a shard."""
    return page_ceil(shard.nbytes) - page_floor(kept)


def _buffer_sizes(shards: Sequence[Shard]) -> list[int]:
    """Sizes of a buffer worth a try: what can be left of the largest shards."""
    largest = max(shard.nbytes for shard in shards)
    sizes = {_streamed_bytes(s, p) for s in shards for p in _places(s) if s.nbytes > largest * _SMALL_SHARE}
    ordered = sorted(sizes or {page_ceil(largest)}, reverse=True)
    step = -(-len(ordered) // _BUFFER_SIZES)
    return ordered[::step]


def _packing_bytes(shard: Shard) -> int:
    """What packing one shard takes beside buffer and session: the packed copy, and once more the tensor in work."""
    largest = max((spec.nbytes for spec in shard.tensors), default=shard.nbytes)
    return page_ceil(shard.nbytes) + page_ceil(largest)


def _residence_order(shards: Sequence[Shard]) -> list[Shard]:
    """Shards in the order in which they become resident."""
    largest = max(shard.nbytes for shard in shards)
    small = [shard for shard in shards if shard.nbytes <= largest * _SMALL_SHARE]
    rest = [shard for shard in shards if shard.nbytes > largest * _SMALL_SHARE]
    return small + [rest[place] for place in _spread(len(rest))]


def _spread(count: int) -> list[int]:
    """0 .. count - 1 so that the first k of them are far apart, for every k (van der Corput's sequence)."""
    bits = count.bit_length() + 1
    reversals = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits if count else 0))
    return list(dict.fromkeys(reversal * count >> bits for reversal in reversals))
