"""KV caches on the nodes, and the inputs of their tokens, from which other nodes can compute them again."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from pipeload.cluster.messages import Text
from pipeload.decode import Decoding, Step
from pipeload.errors import ClosedError, ConfigError
from pipeload.format.caches import can_be_cut, growth
from pipeload.format.manifest import Manifest, evaluate_dim, symbols
from pipeload.inputs import Arrays

if TYPE_CHECKING:
    from pipeload.cluster.ring import Ring

__all__ = ["ClusterState", "Texts"]


class Texts:
    """How the inputs of a model's steps are joined and cut along their tokens.

    Args:
        manifest: the model.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.decoding = Decoding(manifest)
        self.can_be_cut = bool(manifest.caches) and can_be_cut(manifest)
        self._shapes = {spec.name: spec.shape for spec in manifest.free_inputs}
        self._grown = growth(manifest)[1] if manifest.caches else 0

    @property
    def can_be_joined(self) -> bool:
        """Whether the inputs of two steps can be those of one."""
        return self.decoding.lengths is not None

    @property
    def can_go_on(self) -> bool:
        """Whether no text ends where its caches are lost: they can be computed again, or there are none."""
        return self.can_be_joined or not self.decoding.caches

    def length(self, dims: Mapping[str, int]) -> int:
        """Tokens in the caches after a step of these sizes."""
        return evaluate_dim(self._grown, dims)

    def cached_shapes(self, dims: Mapping[str, int], length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of caches of this many tokens, of a text whose other sizes are `dims`."""
        return self.decoding.shapes(dims, length)

    def free(self, arrays: Arrays) -> Arrays:
        """The arrays without caches."""
        return {name: array for name, array in arrays.items() if name in self._shapes}

    def joined(self, before: Arrays, after: Arrays) -> Arrays:
        """The inputs of two steps as those of one: new tokens follow, and a mask over all tokens is the latest."""
        text = self._text()
        found = {}
        for name, array in after.items():
            axes = [axis for axis, dim in enumerate(self._shapes[name]) if tuple(symbols(dim)) == (text,)]
            found[name] = np.concatenate([before[name], array], axes[0]) if axes else array
        return found

    def cut(self, arrays: Arrays, length: int) -> Arrays:
        """The inputs of one step from the beginning, without the tokens after the first `length`."""
        lengths = self.decoding.lengths
        grown = {(self._text(),), tuple(sorted(lengths or ()))}
        return {
            name: array[
                tuple(
                    slice(length) if tuple(sorted(symbols(dim))) in grown else slice(None) for dim in self._shapes[name]
                )
            ]
            for name, array in arrays.items()
        }

    def pieces(
        self, arrays: Arrays, dims: Mapping[str, int], past: int, length: int, positions: int, expected: int
    ) -> list[tuple[Arrays, int]]:
        """The inputs of a step in pieces of at most 256 tokens, and the number of tokens before each."""
        if self.decoding.lengths is None:
            return [(arrays, past)]
        before, text = self.decoding.lengths
        sizes = {**dims, before: past, text: length - past}
        step = Step(length=length, capacity=length, expected=max(length, expected), batch=1)
        pieces, _ = self.decoding.pieces(arrays, sizes, positions, step)
        name, axis = next(
            (name, axis)
            for name, shape in self._shapes.items()
            for axis, dim in enumerate(shape)
            if tuple(symbols(dim)) == (text,)
        )
        found = []
        for piece in pieces:
            found.append((piece, past))
            past += piece[name].shape[axis]
        return found

    def _text(self) -> str:
        assert self.decoding.lengths is not None
        return self.decoding.lengths[1]


class ClusterState:
    """KV caches of one batch of growing texts, on the nodes of a cluster.

    Attributes:
        length: tokens in the caches.
        batch: sequences; 0 before the first step.
        expected: tokens that the next steps will need in the end.
        dims: sizes of the latest step.
        inputs: of all tokens in the caches, as those of one step; None before the first one.
        ring: where the caches are; None where they are nowhere.
        id: the caches' there. It changes where they are computed anew.
        steps: taken there.
        closed: by `close`.
    """

    def __init__(self, texts: Texts, capacity: int, end: Callable[[ClusterState], object]) -> None:
        self._texts, self._end = texts, end
        self.length = self.batch = self.steps = 0
        self.expected = capacity
        self.dims: Mapping[str, int] = {}
        self.inputs: Arrays | None = None
        self.ring: Ring | None = None
        self.id = ""
        self.closed = False
        self._most, self._most_s = 0, 0.0

    @property
    def nbytes(self) -> int:
        """Memory of the caches, on all nodes."""
        return self._texts.decoding.full_cache_bytes(self.batch, self.length) if self.length else 0

    def expect(self, tokens: int) -> None:
        """Tell that the next steps will need this many tokens; the next step plans for them."""
        self.expected = tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`, as if their steps had not been taken.

        Raises:
            ConfigError: the state has fewer tokens, or keeps something that does not grow with them.
        """
        if not isinstance(length, int | np.integer) or not 0 <= length <= self.length:
            raise ConfigError(f"length is {length!r}; this decode state can be cut to 0 to {self.length} tokens.")
        if length == self.length:
            return
        if length and not self._texts.can_be_cut:
            raise ConfigError(
                "This model keeps something between its steps that does not grow with the text, so no tokens can be "
                "forgotten. Generate without drafts, and with a new state for each text."
            )
        self.inputs = self._texts.cut(self.inputs, length) if length and self.inputs is not None else None
        self.length = int(length)
        if not length and not self._texts.can_be_cut:
            self.drop()

    async def bring(self, ring: Ring) -> bool:
        """Whether these stages have the caches; they take them from the stages before where that is the faster way.

        Only called in the client's loop, as `start`.
        """
        before = self.ring
        if before is ring or before is None or not self.length:
            return before is ring
        copying_s = ring.copying_s(before, self.dims, self.length)
        if copying_s is None or not self._texts.can_be_cut or copying_s >= self.again_s(before, ring):
            return False
        text = Text(state=self.id, length=self.length, expected=self.expected, dims=self.dims)
        if not await ring.take(text):
            return False
        # It was brought by both, a step and the move itself; or it was closed.
        if self.ring is before and self.id == text.state:
            self.ring = ring
        if self.ring is not ring:
            await ring.end_state(text.state)
        return self.ring is ring

    def start(self, ring: Ring) -> None:
        """Begin anew on these stages, with the first token."""
        self.ring, self.id, self.steps = ring, uuid.uuid4().hex, 0

    def timed(self, tokens: int, seconds: float) -> None:
        """Note the time of a step. That of the largest one tells how long it takes to compute the caches again."""
        if tokens >= self._most:
            self._most, self._most_s = tokens, seconds

    def again_s(self, before: Ring, ring: Ring) -> float:
        """Seconds to compute the caches again: as the largest step has taken, on nodes as fast as those now are."""
        gain = ring.placement.latency_s / before.placement.latency_s
        return self._most_s * self.length / self._most * gain if self._most else 0.0

    def drop(self) -> None:
        """The caches are of no use any more; the next step computes them again."""
        self._end(self)
        self.ring = None

    def close(self) -> None:
        """Give the memory of the caches back. May be called again."""
        if not self.closed:
            self.closed = True
            self.drop()
            self.inputs, self.length = None, 0

    def check_usable(self) -> None:
        """Raise ClosedError when the state was closed."""
        if self.closed:
            raise ClosedError("This decode state is closed. Make a new one with model.new_state().")

    def __enter__(self) -> ClusterState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
