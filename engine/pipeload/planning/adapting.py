"""When a model that runs on several nodes moves to another placement: rarely, and for a good reason. Pure.

At each look at the nodes the present placement and the best one are predicted with what is known now. In this order:

```
keep      the present placement has room, and no other one is faster by at least 10 %
move      another one is, for some looks in a row, and the latest change was some time ago;
          or a stage has no room on its node any more, for fewer looks in a row
give up   a stage has no room any more, and no other placement has
```

A change needs time, and what is measured swings, so a promise must hold for a while. After each change the model stays
where it is for a time, which doubles when changes follow each other. A node that was found to be slow, and runs nothing
any more, tells nothing new: it stays slow for some minutes, twice as long each time, and then is as its profile says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias

from pipeload.planning.placement import Placement

__all__ = ["Adapting", "Decision", "Outlook", "Sending", "Slowness"]

_GAIN = 0.1
"""Another placement must save at least this fraction of the objective."""
_LOOKS, _FORCED_LOOKS = 10, 4
"""Looks in a row that must agree on a gain, and on a stage without room. There are two a second."""
_REST_S, _MOST_REST_S = 30.0, 1800.0
"""The time after a change in which no gain is a reason for another one."""
_CLOSE = 4
"""A change within this many rests after the one before makes the next rest twice as long."""
_SWING = 1.25
"""A node that takes up to this many times as long as at its best is not slow."""
_SLOW_S, _MOST_SLOW_S = 600.0, 9600.0
"""The time for which a node that runs nothing counts as slow."""
_STEP = 0.2
"""A slowness that differs from the one in force by less than this fraction is the same."""

_OTHER_TIME = 2.0
"""Messages that take this many times as long, or as short, as when their link was measured: it has changed."""

Decision: TypeAlias = Literal["keep", "move", "give up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A model's placements, with the budgets and speeds that nodes have now.

    Attributes:
        present: the one in force; None where a stage has no room on its node any more.
        best: of all; None where none has room.
    """

    present: Placement | None
    best: Placement | None


class Adapting:
    """Decides for one model.

    Args:
        latency_share: see `place_shards`.
    """

    def __init__(self, latency_share: float = 1.0) -> None:
        self._latency_share = latency_share
        self._wished: Decision = "keep"
        self._looks = 0
        self._rest_s = _REST_S
        self._changed_s = self._rests_until_s = self._failed_until_s = -inf

    def look(self, outlook: Outlook, now_s: float) -> Decision:
        """Take a look at the nodes.

        Args:
            outlook: see there.
            now_s: by a clock that never goes back.
        """
        wish = self._wish(outlook)
        # A stage that loses its room while another placement is faster is the same wish.
        self._looks = self._looks + 1 if wish == self._wished else 1
        self._wished = wish
        forced = outlook.present is None
        if self._looks < (_FORCED_LOOKS if forced else _LOOKS):
            return "keep"
        return "keep" if now_s < (self._failed_until_s if forced else self._rests_until_s) else wish

    def changed(self, now_s: float, *, failed: bool = False) -> None:
        """The model was moved, or that failed: it rests."""
        close = now_s - self._changed_s < _CLOSE * self._rest_s
        self._rest_s = min(2 * self._rest_s, _MOST_REST_S) if close else _REST_S
        self._changed_s, self._rests_until_s = now_s, now_s + self._rest_s
        if failed:
            self._failed_until_s = self._rests_until_s
        self._looks = 0

    def _wish(self, outlook: Outlook) -> Decision:
        present, best = outlook.present, outlook.best
        if best is None:
            return "give up" if present is None else "keep"
        if present is None:
            return "move"
        share = self._latency_share
        return "move" if best.objective(share) <= (1 - _GAIN) * present.objective(share) else "keep"


Factors: TypeAlias = tuple[float, float]
"""How much longer computing and reading take than at their best."""

_FAST: Factors = (1.0, 1.0)


@dataclass(slots=True)
class _Slow:
    factors: Factors = _FAST
    until_s: float = inf
    lasts_s: float = _SLOW_S


class Slowness:
    """What is known of each node's slowness."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Slow] = {}

    def look(self, node: str, measured: Factors | None, now_s: float, *, runs: bool) -> Factors:
        """The slowness of a node to place by.

        Args:
            node: this start of it.
            measured: by passes there; None before the first one.
            now_s: by a clock that never goes back.
            runs: whether it runs a part of the model.
        """
        own = self._nodes.setdefault(node, _Slow())
        if measured is not None:
            if own.until_s < inf:
                # It is tried again: where it is still slow, it stays so for longer the next time.
                own.lasts_s, own.until_s = min(2 * own.lasts_s, _MOST_SLOW_S), inf
            run, read = (_stepped(before, now) for before, now in zip(own.factors, measured, strict=True))
            own.factors = (run, read)
        elif runs:
            # It has just begun to, and has its stage from before or another one.
            pass
        elif own.factors != _FAST and own.until_s == inf:
            own.until_s = now_s + own.lasts_s
        elif now_s >= own.until_s:
            own.factors = _FAST
        return own.factors


class Sending:
    """When links are measured anew: rarely, since that takes a part of what they carry.

    Stages tell how much longer their messages take than at their best. Where that has changed for some looks in a row,
    all links of both nodes are measured, since only one of them may be at fault; and again after some minutes, twice as
    many each time, since links that carry nothing any more tell nothing.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}
        self._measured: frozenset[str] = frozenset()
        self._looks = 0
        self._rests_until_s, self._again_s, self._lasts_s = -inf, inf, _SLOW_S

    def look(self, told: Mapping[tuple[str, str], float], now_s: float) -> frozenset[str]:
        """The nodes whose links are to be measured now.

        Args:
            told: nodes that send and take -> how much longer that takes than at its best.
            now_s: by a clock that never goes back.
        """
        changed = {
            pair
            for pair, factor in told.items()
            if not 1 / _OTHER_TIME < factor / self._known.get(pair, 1.0) < _OTHER_TIME
        }
        self._looks = self._looks + 1 if changed else 0
        if self._looks >= _FORCED_LOOKS and now_s >= self._rests_until_s:
            nodes, self._lasts_s = frozenset().union(*changed), _SLOW_S
        elif now_s >= self._again_s:
            nodes, self._lasts_s = self._measured, min(2 * self._lasts_s, _MOST_SLOW_S)
        else:
            return frozenset()
        self._known |= told
        self._measured |= nodes
        self._looks = 0
        self._rests_until_s, self._again_s = now_s + _REST_S, now_s + self._lasts_s
        return nodes


def _stepped(before: float, now: float) -> float:
    now = now if now > _SWING else 1.0
    return before if abs(now - before) < _STEP * before else now
