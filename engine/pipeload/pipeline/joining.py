"""Rows of several calls in one batch: padded to one length, run together, and given back to their callers.

```
call 0   a b c     |                 a b c .                       | row 0, 3 tokens     to call 0
call 1   d e       | one feed over   d e . .    outputs, cut into  | row 1, 2 tokens     to call 1
call 2   f g h i   |                 f g h i                       | row 2, 4 tokens     to call 2
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeload.errors import ClosedError, RunError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import Stopper, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs

__all__ = ["MOST_TOKENS", "Batch", "Joins", "Padding", "Rows", "grouped"]

MOST_TOKENS = 512
"""A joined batch has at most this many tokens, padding included. A processor computes no text faster beside more."""
_PADDING_FACTOR = 1.25
"""A joined batch has at most this many times the tokens of its calls: what padding adds is computed for nothing."""
_REMEDY = "The system may be out of memory: lower the memory budget, or end other programs."


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How rows of texts are brought to one length.

    Attributes:
        fills: graph input -> the value of padding.
        left: padding comes before a text, not after it.
    """

    fills: tuple[tuple[str, int], ...]
    left: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Joins:
    """How the dimensions of a model let rows of several calls share a batch.

    Attributes:
        rows: the symbol of the first dimension of each input and output.
        length: the symbol of the second dimension of each input.
        axes: output -> its dimensions of that symbol.
    """

    rows: str
    length: str
    axes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(manifest: Manifest) -> Joins | None:
        """Those of a model; None where an input or an output has a dimension of another kind."""
        shapes = {spec.shape for spec in manifest.inputs}
        if manifest.caches or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
            return None
        rows, length = shape
        if not isinstance(rows, str) or not isinstance(length, str):
            return None
        axes = {}
        for spec in manifest.outputs:
            if spec.shape[:1] != (rows,) or {dim for dim in spec.shape[1:] if isinstance(dim, str)} - {length}:
                return None
            axes[spec.name] = tuple(axis for axis, dim in enumerate(spec.shape) if dim == length)
        return Joins(rows=rows, length=length, axes=axes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The rows of a call that may share a batch with those of others.

    Attributes:
        count: rows.
        length: tokens of each.
        padding: makes them longer.
        joins: of the model.
        needs_of: rows and length of a batch -> its needs, and its kind; see `Call`.
        output_bytes: of the call's part of the outputs.
    """

    count: int
    length: int
    padding: Padding
    joins: Joins
    needs_of: Callable[[int, int], tuple[Needs, object]]
    output_bytes: int


class Batch:
    """Calls that run as one feed: one call, or several whose rows are joined.

    Args:
        calls: at least one.

    Attributes:
        calls: the same.
        feed: runs them.
        needs: of the feed.
        kind: of the feed; see `Call`.
    """

    def __init__(self, calls: Sequence[Call[Any]]) -> None:
        self.calls = calls
        first = calls[0]
        self.feed, self.needs, self.kind = first.feed, first.needs, first.kind
        if first.rows is not None and len(calls) > 1:
            needs, self.kind = _needs(calls, first.rows)
            # The callers' parts are copies.
            parts_bytes = sum(call.rows.output_bytes for call in calls if call.rows is not None)
            self.needs = replace(needs, pass_bytes=needs.pass_bytes + parts_bytes)
            self.feed = _joined(calls, first.rows)

    def settle(self) -> bool:
        """Give each call its part of the outputs, or the error of a feed that was ended.

        Returns:
            Whether a shard failed for joined rows. One of them may be the cause, so each call is to run again, alone.
        """
        rows, feed = self.calls[0].rows, self.feed
        if rows is None or len(self.calls) == 1:
            return False
        for call in self.calls:
            call.feed.stopper.then = None
        if feed.error is not None and not isinstance(feed.error, ClosedError):
            for call in self.calls:
                call.rows = None
            return True
        try:
            with foreign_errors(RunError, "The outputs of joined rows could not be cut apart", _REMEDY):
                self._cut(rows)
        except Exception as error:  # noqa: BLE001 - the callers get it
            for call in self.calls:
                call.feed.error = error
        return False

    def _cut(self, rows: Rows) -> None:
        begin = 0
        for call in self.calls:
            assert call.rows is not None
            call.feed.error = self.feed.error
            length = call.rows.length
            for name, value in self.feed.outputs.items():
                cut = {
                    axis: slice(-length, None) if rows.padding.left else slice(length) for axis in rows.joins.axes[name]
                }
                cut[0] = slice(begin, begin + call.rows.count)
                part = tuple(cut.get(axis, slice(None)) for axis in range(1 + max(cut)))
                call.feed.outputs[name] = to_value(to_array(value)[part])
            begin += call.rows.count


def grouped(calls: Sequence[Call[Any]], room_bytes: int) -> list[list[Call[Any]]]:
    """The calls of each batch, the first call in the first one: texts of like length are together.

    Args:
        calls: at least one.
        room_bytes: the most that a pass of a joined batch may need, so that no weights leave memory for it.
    """
    left, found = list(calls), []
    while left:
        chosen = _beside(left[0], left[1:])
        while (rows := chosen[0].rows) and len(chosen) > 1 and _needs(chosen, rows)[0].pass_bytes > room_bytes:
            chosen = chosen[: len(chosen) // 2]
        left = [call for call in left if call not in chosen]
        found.append(chosen)
    return found


def _beside(first: Call[Any], others: Sequence[Call[Any]]) -> list[Call[Any]]:
    """A call, and those whose rows may be joined to its own, the ones of the most similar length first."""
    chosen = [first]
    if (own := first.rows) is None:
        return chosen
    count, longest, tokens = own.count, own.length, own.count * own.length
    alike = [(call, rows) for call in others if (rows := call.rows) is not None and rows.padding == own.padding]
    for call, rows in sorted(alike, key=lambda one: abs(one[1].length - own.length)):
        together, length = count + rows.count, max(longest, rows.length)
        sum_of_tokens = tokens + rows.count * rows.length
        if together * length <= min(MOST_TOKENS, _PADDING_FACTOR * sum_of_tokens):
            count, longest, tokens = together, length, sum_of_tokens
            chosen.append(call)
    return chosen


def _needs(calls: Sequence[Call[Any]], rows: Rows) -> tuple[Needs, object]:
    """The needs of joined calls, and their kind."""
    all_rows = [call.rows for call in calls if call.rows is not None]
    return rows.needs_of(sum(one.count for one in all_rows), max(one.length for one in all_rows))


def _joined(calls: Sequence[Call[Any]], rows: Rows) -> Feed:
    length = max(call.rows.length for call in calls if call.rows is not None)
    fills = dict(rows.padding.fills)
    piece = {}
    for name in calls[0].feed.pieces[0]:
        arrays = [to_array(call.feed.pieces[0][name]) for call in calls]
        whole = np.full((sum(map(len, arrays)), length), fills[name], arrays[0].dtype)
        begin = 0
        for array in arrays:
            width = array.shape[1]
            whole[begin : begin + len(array), slice(length - width, None) if rows.padding.left else slice(width)] = (
                array
            )
            begin += len(array)
        piece[name] = to_value(whole)
    return Feed(pieces=[piece], stopper=_JointStopper([call.feed.stopper for call in calls]))


class _JointStopper(Stopper):
    """Stops when each of some stoppers has stopped: a caller that leaves ends nothing for the others."""

    def __init__(self, parts: Sequence[Stopper]) -> None:
        super().__init__()
        self._parts = parts
        for one in parts:
            one.then = self._look
        self._look()

    def _look(self) -> None:
        if all(one.stopped for one in self._parts):
            self.stop()
