"""Ways to use the memory that is left for weights: resident shards, streamed ranges, buffers and sessions. Pure.

Resident shards are spread evenly among the streamed ones, so that reading never pauses: in the order of van der
Corput's sequence, small ones first. Of the others, the tensors before and behind the streamed range stay, as far as
memory allows.

Shards that have the same weights (ALBERT's layers) are resident or streamed together: their range of the file stays in
memory once for all of them, so they come before shards with weights of their own. Packed copies are one for each shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from typing import TypeAlias

from pipeload.format.manifest import Shard, first_places
from pipeload.format.pages import memory_ceil, room_bytes
from pipeload.format.placement import place
from pipeload.planning.footprint import Footprint
from pipeload.planning.rates import Rates

__all__ = ["Layout", "Range", "layouts", "staying"]

Range: TypeAlias = tuple[int, int]
"""First byte of a part of a shard's weights, and the byte after its last one."""

_Group: TypeAlias = tuple[Shard, ...]
"""A shard alone, or all shards with the same weights."""

_SMALL_SHARE = 0.1
"""A shard below this fraction of the largest becomes resident first: it saves a session, and costs next to nothing."""
_TINY_SHARE = 0.02
"""The streamed range of a shard, and each kept part before or behind it, are at least this fraction of the shard."""
_RANGE_SIZES = 12
"""At most this many sizes of streamed ranges are tried."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """A range of a shard that may be streamed.

    Attributes:
        streamed: the range.
        read_bytes: memory for its pages.
        buffer_bytes: of the buffer for it: the same, or more where weights are widened.
        staying_bytes: of memory for the kept parts.
    """

    streamed: Range
    read_bytes: int
    buffer_bytes: int
    staying_bytes: int

    @classmethod
    def of(cls, shard: Shard, streamed: Range) -> _Choice:
        staying_bytes = sum(room_bytes(*part) for part in staying(shard, streamed))
        return cls(streamed, room_bytes(*streamed), place(shard, streamed).nbytes, staying_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to use the memory that is left for weights. `sessions` and `sessions_bytes` are those of `Plan`."""

    loaders: int
    buffers: int
    buffer_bytes: int
    sessions: int | None
    sessions_bytes: int
    resident: frozenset[str]
    partly_resident: dict[str, Range]
    packed: bool
    packed_streamed: bool
    packing_bytes: int
    used_bytes: int
    resident_bytes: int
    streamed_bytes: int
    threads: int = 1


def staying(shard: Shard, streamed: Range) -> list[Range]:
    """The parts of a shard's weights that stay in memory, as they are stored, while a range of them is streamed."""
    begin, end = streamed
    return [part for part in ((0, begin), (end, shard.nbytes)) if part[0] < part[1]]


def layouts(shards: Sequence[Shard], free: int, speed: Rates, loaders: int | None) -> Iterator[Layout]:
    """Every layout that is worth a look and fits into `free` bytes."""
    order = _residence_order(_groups(shards))
    counts = [loaders] if loaders else speed.loaders
    choices = {shard.name: _choices(shard, alone=len(group) == 1) for group in order for shard in group}
    sizes = _range_sizes(shards, choices)
    # Beside a session with a copy of its weights, a buffer is small: there may be more of them than sessions.
    apart = any(shard.packed for shard in shards)
    slots = [
        (count, buffers, sessions, size)
        for count in counts
        for buffers in range(1, count + 2)
        for sessions in (None, *(range(1, buffers) if apart else ()))
        for size in sizes
    ]
    slots += [(count, 0, None, 0) for count in counts]
    narrow = any(shard.widens for shard in shards)
    for threads in sorted(speed.times, reverse=True):
        fill = cache(partial(_fill, _Memory(order, choices, free, Footprint.of(shards, threads))))
        # Even where packing pays, memory for the packed copies may be lacking.
        ways = (False, True) if speed.packing_streamed_pays(threads) else (False,)
        # No layout that reads in every pass is worth a look where there is room for the packed copies of all shards.
        fits = fill(0, 0, None, 0, True, False, len(order)) is not None
        some = [slot for slot in slots if not slot[1]] if fits else slots
        for packed, pack_streamed in product((False, True), ways):
            for count, buffers, sessions, size in some:
                # Beyond one for each session, Loading Agents take no memory.
                wanted = min(count, sessions or buffers), buffers, sessions, size, packed, pack_streamed
                layout = fill(*wanted, len(order))
                found = [layout] if layout is not None else []
                if layout is not None and narrow:
                    # Fewer shards may be resident, and more of the others stay as it is stored.
                    most = len(layout.resident)
                    found += filter(None, (fill(*wanted, fewer) for fewer in sorted({most // 2, 0} - {most})))
                yield from (replace(each, loaders=count, threads=threads) for each in found)


class _Memory:
    """What all ways to fill the memory with one number of threads have in common.

    Args:
        order: groups of shards, in the order in which they get memory.
        choices: shard -> ranges of it that may be streamed, the largest first.
        free: bytes for all weights.
        beside: memory of shards, and beside them.
    """

    def __init__(
        self, order: Sequence[_Group], choices: Mapping[str, Sequence[_Choice]], free: int, beside: Footprint
    ) -> None:
        self.order, self.free, self.beside = order, free, beside
        self._choices = choices
        self._fitting: dict[tuple[int, bool], tuple[dict[str, list[_Choice]], int]] = {}
        self._group_bytes = {
            packed: {group[0].name: beside.group_bytes(group, packed=packed) for group in order}
            for packed in (False, True)
        }
        self.most_session_bytes = max(beside.sessions.values())

    def group_bytes(self, *, packed: bool) -> Mapping[str, int]:
        """First shard of a group -> bytes of the group, where it is resident."""
        return self._group_bytes[packed]

    def fitting(self, read_bytes: int, *, whole: bool) -> tuple[Mapping[str, Sequence[_Choice]], int]:
        """Shard -> its ranges of at most `read_bytes`, the largest range only where shards are read as a whole; and the
        bytes of a buffer for any of them.
        """
        key = read_bytes, whole
        if key not in self._fitting:
            most = 1 if whole else None
            fitting = {
                name: [choice for choice in found[:most] if choice.read_bytes <= read_bytes]
                for name, found in self._choices.items()
            }
            buffer_bytes = max((choice.buffer_bytes for found in fitting.values() for choice in found), default=0)
            self._fitting[key] = fitting, buffer_bytes
        return self._fitting[key]


class _Filling:
    """Memory that is filled with weights that stay, step by step.

    Args:
        memory: what there is.
        fitting: shard -> ranges of it that may be streamed, the largest first; none of a shard that must be whole.
        packed: whether resident shards are packed.
        used: bytes that are taken already.

    Attributes:
        chosen: shard that is not whole -> its streamed range.
        whole: groups that stay as a whole.
        used: bytes that are taken.
    """

    def __init__(
        self,
        memory: _Memory,
        fitting: Mapping[str, Sequence[_Choice]],
        *,
        packed: bool,
        used: int,
    ) -> None:
        self._order, self._fitting, self._free = memory.order, fitting, memory.free
        self._apart_bytes, self._bytes = memory.beside.apart_bytes, memory.group_bytes(packed=packed)
        self.chosen = {name: found[0] for name, found in fitting.items() if found}
        self.whole = [group for group in self._order if group[0].name not in self.chosen]
        self.used = used + sum(choice.staying_bytes for choice in self.chosen.values())
        self.used += sum(self._bytes[group[0].name] for group in self.whole)
        self._apart = any(group[0].packed for group in self.whole)
        self.used += self._apart_bytes if self._apart else 0

    def keep_whole(self, most: int) -> None:
        """Keep groups as a whole, as far as there is memory, until there are `most` of them."""
        for group in self._left():
            if len(self.whole) >= most:
                return
            more = self._bytes[group[0].name]
            more -= sum(self.chosen[shard.name].staying_bytes for shard in group)
            more += self._apart_bytes if group[0].packed and not self._apart else 0
            if self.used + more <= self._free:
                self._apart = self._apart or group[0].packed
                self.whole.append(group)
                self.used += more
                for shard in group:
                    del self.chosen[shard.name]

    def keep_parts(self) -> None:
        """Keep as much as there is memory for of shards that are not whole."""
        for name in [shard.name for group in self._left() for shard in group]:
            self.used -= self.chosen[name].staying_bytes
            *_, least = (one for one in self._fitting[name] if self.used + one.staying_bytes <= self._free)
            self.chosen[name] = least
            self.used += least.staying_bytes

    def _left(self) -> list[_Group]:
        return [group for group in self._order if group[0].name in self.chosen]


def _fill(
    memory: _Memory,
    packers: int,
    buffers: int,
    sessions: int | None,
    read_bytes: int,
    packed: bool,
    pack_streamed: bool,
    whole: int,
) -> Layout | None:
    """Fill the memory beside the buffers with weights that stay; None when the layout does not fit.

    At most `packers` Loading Agents pack at once. There are `sessions` of streamed shards, or one for each buffer. No
    shard has a larger streamed range than `read_bytes`. Up to `whole` groups stay as a whole before parts of others
    stay as they are stored; what memory is left then keeps more groups.
    """
    order, beside = memory.order, memory.beside
    packing = beside.packing_bytes if packed else 0
    # The packed copy of a shard takes memory for the whole shard.
    # Without a buffer, nothing is streamed, not even a range of no bytes.
    fitting, buffer_bytes = memory.fitting(read_bytes if buffers else -1, whole=pack_streamed)
    count = buffers if sessions is None else sessions
    sessions_bytes = count * memory.most_session_bytes
    if pack_streamed:
        # Each Loading Agent packs a shard of its own.
        sessions_bytes += count * buffer_bytes
    if pack_streamed or beside.apart_bytes:
        sessions_bytes += packers * beside.second_copy_bytes
    used = packing + buffers * buffer_bytes + sessions_bytes
    filling = _Filling(memory, fitting, packed=packed, used=used)
    if filling.used > memory.free:
        return None
    filling.keep_whole(whole)
    filling.keep_parts()
    if whole < len(order):
        filling.keep_whole(len(order))
    chosen, kept, used = filling.chosen, filling.whole, filling.used
    if bool(buffers) != bool(chosen) or buffers > len(chosen):
        return None
    ranges = {name: choice.streamed for name, choice in chosen.items()}
    streamed_bytes = sum(end - begin for begin, end in ranges.values())
    resident_bytes = sum(shard.nbytes for group in kept for shard in (group if packed else group[:1]))
    resident_bytes += sum(s.nbytes for group in order for s in group if s.name in ranges) - streamed_bytes
    return Layout(
        loaders=packers,
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        sessions=sessions,
        sessions_bytes=0 if sessions is None else sessions_bytes,
        resident=frozenset(shard.name for group in kept for shard in group),
        partly_resident={name: streamed for name, streamed in ranges.items() if chosen[name].staying_bytes},
        packed=packed,
        packed_streamed=pack_streamed and bool(ranges),
        packing_bytes=packing,
        used_bytes=used,
        resident_bytes=resident_bytes,
        streamed_bytes=streamed_bytes,
    )


def _groups(shards: Sequence[Shard]) -> list[_Group]:
    """The shards, those with the same weights together."""
    found: dict[int, list[Shard]] = {}
    for shard, first in zip(shards, first_places(shards), strict=True):
        found.setdefault(first, []).append(shard)
    return [tuple(group) for group in found.values()]


def _choices(shard: Shard, *, alone: bool) -> list[_Choice]:
    """Ranges of a shard that may be streamed while the rest stays: adjacent tensors; the largest range first.

    Of a shard that is not alone with its weights, all is streamed or nothing.
    """
    if shard.weights is None or not alone:
        return [_Choice.of(shard, (0, shard.nbytes))]
    # Tiny tensors are not worth a part of their own.
    step = shard.nbytes * _TINY_SHARE
    places = [0]
    for spec in shard.tensors:
        place = spec.offset - shard.weights.offset
        if place - places[-1] >= step and shard.nbytes - place >= step:
            places.append(place)
    places.append(shard.nbytes)
    # Of two that are about as large, the one that leaves fewer parts around it.
    ranges = sorted(combinations(places, 2), key=lambda r: (r[0] - r[1], len(staying(shard, r))))
    found: list[Range] = []
    for begin, end in ranges:
        if not found or found[-1][1] - found[-1][0] - (end - begin) >= step:
            found.append((begin, end))
    if shard.widens:
        # All of it stays as it is stored, and is widened into a buffer for each pass.
        found.append((0, 0))
    return [_Choice.of(shard, streamed) for streamed in found]


def _range_sizes(shards: Sequence[Shard], choices: Mapping[str, Sequence[_Choice]]) -> list[int]:
    """Sizes worth a try for the largest streamed range: those of the ranges of the largest shards."""
    largest = max(shard.nbytes for shard in shards)
    sizes = {c.read_bytes for s in shards for c in choices[s.name] if s.nbytes > largest * _SMALL_SHARE}
    ordered = sorted(sizes - {0} or {memory_ceil(largest)}, reverse=True)
    step = -(-len(ordered) // _RANGE_SIZES)
    return ordered[::step]


def _residence_order(groups: Sequence[_Group]) -> list[_Group]:
    """Groups in the order in which they become resident."""
    largest = max(group[0].nbytes for group in groups)
    small = [group for group in groups if group[0].nbytes <= largest * _SMALL_SHARE]
    large = [group for group in groups if group[0].nbytes > largest * _SMALL_SHARE]
    # Their range saves a read for each of them.
    common = [group for group in large if len(group) > 1]
    rest = [group for group in large if len(group) == 1]
    return small + common + [rest[place] for place in _spread(len(rest))]


def _spread(count: int) -> list[int]:
    """0 .. count - 1 so that the first k of them are far apart, for every k (van der Corput's sequence)."""
    bits = count.bit_length() + 1
    reversals = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits if count else 0))
    return list(dict.fromkeys(reversal * count >> bits for reversal in reversals))
