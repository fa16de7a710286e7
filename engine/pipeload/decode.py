"""Decoding step by step: the KV caches kept between steps, and the way of a step through the shards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ClosedError, ConfigError
from pipeload.format.caches import can_be_cut, growth, past_symbols
from pipeload.format.manifest import LENGTH_AXIS, Manifest, evaluate_dim, symbols
from pipeload.inputs import Arrays, numpy_dtype
from pipeload.pipeline.cache_room import zeros
from pipeload.pipeline.session import Value, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning import needs

__all__ = ["CAPACITY_STEP", "DecodeState", "Decoding", "Step"]

CAPACITY_STEP = 128
"""Caches grow by this number of tokens, so that they are seldom copied and the plan changes seldom."""
_PIECE_TOKENS = 256
"""A longer text passes through each shard in pieces of this many tokens, counted over all sequences."""


class DecodeState:
    """KV caches of one batch, counted in the model's budget until `close`.

    Attributes:
        length: tokens in the caches.
        capacity: tokens that the budget has room for.
        expected: tokens that the next steps will need in the end.
        batch: sequences; 0 before the first step.
        steps: taken since `expect`, or since it was made: those that have taken fewer go first.
        caches: graph input -> value, as the latest step made it.
    """

    __module__ = "pipeload"

    def __init__(
        self,
        capacity: int,
        on_close: Callable[[DecodeState], None],
        maker: object,
        *,
        length_axis: int | None,
        in_place: bool,
    ) -> None:
        self.length = 0
        self.capacity = self.expected = self._first_capacity = capacity
        self.batch = self.steps = 0
        self.caches: dict[str, Value] = {}
        # The step that is queued, runs, or has ended and is not settled yet.
        self._coming: tuple[Feed, Step] | None = None
        # Whether the caches were made with the frequencies of texts longer than `RopeChange.tokens`.
        self._is_long = False
        self._on_close = on_close
        self._length_axis = length_axis
        self._in_place = in_place
        # Weak: a state that the caller keeps must not keep alive a model that the caller has dropped.
        self._maker = weakref.ref(maker)
        self.closed = False

    def check_usable_by(self, model: object) -> None:
        """Raise ClosedError when the state was closed, ConfigError when another model than this one made it."""
        if self.closed:
            raise ClosedError("This decode state is closed. Make a new one with model.new_state().")
        if self._maker() is not model:
            raise ConfigError(
                "This decode state holds the caches of another model. Make one with new_state() of the model that "
                "takes the step."
            )

    @property
    def room(self) -> int:
        """Tokens that the caches have memory for."""
        if not self._in_place or self._length_axis is None:
            return self.length
        # A copy: a pass that was withdrawn may still make some larger.
        return max((value.shape()[self._length_axis] for value in [*self.caches.values()]), default=0)

    @property
    def nbytes(self) -> int:
        """Memory of the caches, with the room behind their tokens."""
        return sum(to_array(value).nbytes for value in [*self.caches.values()])

    @property
    def _granted(self) -> tuple[int, int]:
        """Sequences and tokens that the caches have memory for, or get in the sweep that runs or has just ended."""
        if (coming := self._coming) is not None and coming[0].begun:
            return coming[1].batch, coming[1].capacity
        return self.batch, self.capacity

    def expect(self, tokens: int) -> None:
        """Tell that the next steps will need this many tokens; the next step plans for them."""
        self.expected, self.steps = tokens, 0
        self.capacity = min(self.capacity, max(tokens, self._first_capacity, self.room))

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`, as if their steps had not been taken.

        Raises:
            ConfigError: the state has fewer tokens, or keeps something that does not grow with them.
        """
        if not isinstance(length, int | np.integer) or not 0 <= length <= self.length:
            raise ConfigError(f"length is {length!r}; this decode state can be cut to 0 to {self.length} tokens.")
        if not length:
            self.caches = {}
        elif length < self.length and self._length_axis is None:
            raise ConfigError(
                "This model keeps something between its steps that does not grow with the text, so no tokens can be "
                "forgotten. Generate without drafts, and with a new state for each text."
            )
        elif not self._in_place and self._length_axis is not None:
            # Also when the length is right: an interrupted step may have left longer caches.
            kept = (slice(None),) * self._length_axis + (slice(length),)
            self.caches = {name: _cut(value, kept) for name, value in self.caches.items()}
        self.length = length

    def cached(self, name: str, begin: int, end: int) -> NDArray[Any]:
        """A copy of a cache's tokens from `begin` to before `end`.

        Args:
            name: of the graph input.
            begin: the first token.
            end: the token after the last one, at most `length`; of a model whose caches can be cut.
        """
        assert self._length_axis is not None
        return to_array(self.caches[name])[(slice(None),) * self._length_axis + (slice(begin, end),)].copy()

    def close(self) -> None:
        """Give the caches' memory back. May be called again."""
        if not self.closed:
            self.closed = True
            self.caches, self.length = {}, 0
            self._on_close(self)

    def __enter__(self) -> DecodeState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a state.

    Attributes:
        length: tokens in the caches when it has succeeded.
        capacity: tokens that the budget has room for from then on.
        expected: tokens that the next steps will need in the end.
        batch: sequences.
    """

    length: int
    capacity: int
    expected: int
    batch: int


class Decoding:
    """The decode states of one model, and their steps.

    Args:
        manifest: the model.

    Attributes:
        caches: graph input -> the graph output that takes its place; empty for a model without caches.
        in_place: the shards write new tokens into the caches that they get.
        keeps_beginnings: the caches of a text serve each text that begins as it does.
        lengths: symbols of the tokens in the caches and of the new ones; None where caches have no such lengths.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.caches = {cache.input: cache.output for cache in manifest.caches}
        self.in_place = any(cache.in_place for cache in manifest.caches)
        self._shapes = {spec.name: spec.shape for spec in manifest.inputs}
        self._dtypes = {spec.name: spec.dtype for spec in manifest.inputs}
        self._length_axis, self._grown = growth(manifest) if manifest.caches else (0, 0)
        self.lengths = _lengths(manifest, self._grown) if manifest.caches else None
        self._can_be_cut = can_be_cut(manifest)
        change = manifest.rope_change
        self.keeps_beginnings = (
            bool(manifest.caches)
            and self._can_be_cut
            and not manifest.quantised_dynamically
            and (change is None or change.keeps_caches)
        )
        self._lock = threading.Lock()
        self._states: weakref.WeakSet[DecodeState] = weakref.WeakSet()

    def new_state(self, capacity: int, model: object) -> DecodeState:
        """An empty state, for steps of this model; it counts in the budget until it is closed."""
        states, lock = self._states, self._lock

        def forget(state: DecodeState) -> None:
            with lock:
                states.discard(state)

        axis = self._length_axis if self._can_be_cut else None
        state = DecodeState(capacity, forget, model, length_axis=axis, in_place=self.in_place)
        with lock:
            states.add(state)
        return state

    def cached_shapes(self, state: DecodeState) -> dict[str, tuple[int, ...]]:
        """Shapes of a state's caches, without the room behind their tokens."""
        shapes = {}
        for name, value in state.caches.items():
            sizes = list(value.shape())
            if self.in_place:
                sizes[LENGTH_AXIS] = state.length
            shapes[name] = tuple(sizes)
        return shapes

    def begin(self, state: DecodeState, feed: Feed, dims: Mapping[str, int]) -> Step:
        """Plan the next step of a state.

        Args:
            state: it holds the tokens before.
            feed: of the step; gets the room that its caches must have, and where it has no positions, all new ones.
            dims: sizes of the symbolic dimensions.

        Raises:
            ConfigError: the feed wants the logits of more positions than there are new tokens, or the caches are of no
                use for a text of this length.
        """
        length = evaluate_dim(self._grown, dims)
        new = length - state.length
        positions = feed.positions = new if feed.positions is None else feed.positions
        if not isinstance(positions, int | np.integer) or not 1 <= positions <= new:
            raise ConfigError(f"positions is {positions!r}; it must be from 1 to {new}, the new tokens of this step.")
        change = self._manifest.rope_change
        if change and not change.keeps_caches and state.length and state._is_long is not self._is_long(length):
            raise ConfigError(
                f"Up to {change.tokens} tokens this model computes a text with other rotary frequencies than above. "
                f"This state holds {state.length} tokens of the one kind, and with this step they become {length} of "
                "the other. Take the whole text in the first step of a new state."
            )
        wanted, feed.room = _room_for(state, length)
        rows = evaluate_dim(self._shapes[next(iter(self.caches))][0], dims)
        expected, batch = max(state.expected, length), max(state.batch, rows)
        step = Step(length=length, capacity=wanted, expected=expected, batch=batch)
        state._coming = feed, step
        return step

    def end(self, state: DecodeState, step: Step, outputs: Mapping[str, Value]) -> None:
        """Settle a step that succeeded: its caches become the state's."""
        if not self.in_place:
            state.caches = {name: outputs[made] for name, made in self.caches.items()}
        state._is_long = self._is_long(step.length)
        state.length, state.capacity, state.batch = step.length, step.capacity, step.batch
        state.steps += 1
        state._coming = None

    @contextmanager
    def holding(self, state: DecodeState, dims: Mapping[str, int], length: int) -> Iterator[None]:
        """Count a state without tokens as one that has the caches of a text; not, where the body fails.

        Args:
            state: see above.
            dims: sizes of the symbolic dimensions in a step of the text.
            length: its tokens.
        """
        before = state.batch, state.capacity
        state.batch = evaluate_dim(self._shapes[next(iter(self.caches))][0], dims)
        state.capacity, _ = _room_for(state, length)
        try:
            yield
        except BaseException:
            state.batch, state.capacity = before
            raise

    def hold(self, state: DecodeState, dims: Mapping[str, int], length: int) -> dict[str, NDArray[Any]]:
        """Make the caches of a state that `holding` counts. Returns them, without the room behind their tokens.

        Args:
            state: see there.
            dims: likewise.
            length: likewise.
        """
        _, room = _room_for(state, length)
        held = {}
        for name, shape in self.shapes(dims, length).items():
            dtype = self._dtypes[name]
            sizes = (*shape[:LENGTH_AXIS], room, *shape[LENGTH_AXIS + 1 :]) if self.in_place else shape
            memory = zeros(sizes, np.dtype(numpy_dtype(dtype)))
            state.caches[name] = to_value(memory, dtype)
            held[name] = memory[tuple(slice(size) for size in shape)]
        state.length, state._is_long = length, self._is_long(length)
        return held

    def shapes(self, dims: Mapping[str, int], length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of caches of this many tokens, of a text whose other sizes are `dims`."""
        sizes = {**dims, **dict.fromkeys(past_symbols(self._manifest), length)}
        return {name: tuple(evaluate_dim(dim, sizes) for dim in self._shapes[name]) for name in self.caches}

    def abandon(self, state: DecodeState) -> None:
        """Settle a step that failed or was withdrawn."""
        if not state.length:
            # A pass that was withdrawn may still write into the old ones.
            state.caches = {}
        # Memory that was not granted is not counted, but some caches may have grown before the pass failed.
        state.capacity = max(state.capacity, state.room)
        state._coming = None

    def pieces(
        self, arrays: Arrays, dims: Mapping[str, int], positions: int, step: Step
    ) -> tuple[list[Arrays], list[Mapping[str, int]]]:
        """A long text in pieces, and the sizes to plan for: those of a piece, and of later steps, with full caches.

        The last piece has all positions whose logits are wanted. Without caches in place there is one piece, and where
        the pieces of a text would be quantised with scales of their own, or have other rotary frequencies.
        """
        if self.lengths is None:
            return [arrays], [dims]
        past, text = self.lengths
        before, length = dims[past], dims[text]
        if not self.in_place:
            # The last of the expected steps goes over all tokens: what does not fit then is refused now.
            size = min(length, positions)
            return [arrays], [dims, {**dims, text: size, past: max(before, step.expected - size)}]
        rows = evaluate_dim(self._shapes[next(iter(self.caches))][0], dims)
        size = min(length, max(positions, _PIECE_TOKENS // max(1, rows)))
        if self._manifest.quantised_dynamically or self._is_long(before + length):
            size = length
        pieces: list[Arrays] = []
        # The first piece takes the remainder, so that the last one is whole.
        for end in range((length - 1) % size + 1, length + 1, size):
            begin = max(end - size, 0)
            cuts = {(text,): slice(begin, end), tuple(sorted((past, text))): slice(0, before + end)}
            pieces.append(
                {
                    name: array[tuple(cuts.get(_symbols(dim), slice(None)) for dim in self._shapes[name])]
                    for name, array in arrays.items()
                }
            )
        # Attention goes over all the room in the caches, whatever a mask hides.
        return pieces, [{**dims, text: size, past: step.capacity - size}]

    def _is_long(self, length: int) -> bool:
        """Whether a text of this many tokens has the frequencies of long ones."""
        change = self._manifest.rope_change
        return change is not None and length > change.tokens

    def cache_bytes(self, state: DecodeState | None = None, step: Step | None = None) -> int:
        """Memory of the caches of all open states, with those of one state as they will be after its next step."""
        with self._lock:
            # Tokens that other states expect are not counted yet.
            sizes = [one._granted for one in self._states if one is not state]
        if step:
            sizes.append((step.batch, step.capacity))
        return sum(self.full_cache_bytes(*size) for size in sizes)

    def growth_bytes(self, state: DecodeState | None, step: Step | None) -> int:
        """The part of `cache_bytes` by which the caches of the state grow in its next step."""
        if state is None or step is None:
            return 0
        before = self.full_cache_bytes(state.batch, state.capacity)
        return self.full_cache_bytes(step.batch, step.capacity) - before

    def expected(self) -> tuple[int, int]:
        """The longest text that an open state expects, in tokens, and the bytes of all caches when all have come."""
        with self._lock:
            sizes = [(one.batch, max(one.capacity, one.expected)) for one in self._states]
        return max((tokens for _, tokens in sizes), default=0), sum(self.full_cache_bytes(*size) for size in sizes)

    def full_cache_bytes(self, batch: int, capacity: int) -> int:
        """Memory of full caches for a number of sequences and tokens."""
        rows = self._shapes[next(iter(self.caches))][0]
        dims = dict.fromkeys(self._manifest.dims, 0)
        if isinstance(rows, str):
            dims[rows] = max(batch, 1)
        # "past + new": one of the symbols stands for all tokens, the others are 0.
        dims[next(symbol for symbol in symbols(self._grown) if symbol in dims)] = capacity
        return needs.cache_bytes(self._manifest, dims)


def _room_for(state: DecodeState, length: int) -> tuple[int, int]:
    """Tokens to plan for, and to make the caches for, of a state that gets this many.

    Attention goes over all room in the caches, so they have no more of it than the text is about to need.
    """
    room = -(-length // CAPACITY_STEP) * CAPACITY_STEP
    wanted = max(state.expected, state.capacity)
    if length > wanted:
        wanted = room
    return wanted, min(room, wanted)


def _lengths(manifest: Manifest, grown: int | str) -> tuple[str, str] | None:
    """The symbols of the tokens in the caches and of the new ones; None where caches have no such lengths."""
    past = past_symbols(manifest)
    new = set(symbols(grown)) - past
    return (min(past), min(new)) if len(past) == len(new) == 1 else None


def _symbols(dim: int | str) -> tuple[str, ...]:
    return tuple(sorted(symbols(dim)))


def _cut(cache: Value, kept: tuple[slice, ...]) -> Value:
    array = to_array(cache)
    return cache if array[kept].shape == array.shape else to_value(array[kept].copy())
