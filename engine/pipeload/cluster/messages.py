"""What nodes tell each other beside arrays, and the way in which they call each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distributed.protocol import to_serialize

from pipeload.errors import ClusterError, PipeloadError
from pipeload.foreign import first_line, foreign_errors

__all__ = ["DisconnectedError", "Job", "NodeLostError", "Place", "Text", "TextLostError", "call"]


class NodeLostError(ClusterError):
    """A node does not answer, or has no such stage any more.

    Attributes:
        address: its address.
    """

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address

    def __reduce__(self) -> tuple[type[NodeLostError], tuple[str, str]]:
        return NodeLostError, (str(self), self.address)


class DisconnectedError(ClusterError):
    """The connections of this process are closed: it ends, or has lost its scheduler."""


class TextLostError(ClusterError):
    """The caches of a text are of no use any more, or not there; they can be computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A stage on a node.

    Attributes:
        node: the node's name.
        address: where it listens.
        key: the actor's, for Dask.
    """

    node: str
    address: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One piece of a decoder's step.

    Attributes:
        state: id of the caches on each node.
        step: number of the step since the state was made.
        past: tokens in the caches before this piece.
        first, last: it is the step's first, last piece.
        expected: tokens that the state will have in the end, as far as the caller knows.
        positions: the answer has the logits of this many of the last tokens.
        top: the answer has only the largest logits of each; 0 for all.
    """

    state: str
    step: int
    past: int
    first: bool
    last: bool
    expected: int
    positions: int
    top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What the caches of a batch of growing texts are.

    Attributes:
        state: their id on each node.
        length: tokens in them.
        expected: tokens that they will have in the end, as far as the caller knows.
        dims: sizes of the symbolic dimensions in their latest step.
    """

    state: str
    length: int
    expected: int
    dims: Mapping[str, int]


async def call(pool: Callable[[str], Any], place: Place, method: str, *arguments: Any) -> Any:
    """Call a method of a stage on another node, and wait for it.

    Args:
        pool: Dask's connections of this process.
        place: the stage.
        method: its name.
        arguments: arrays in dicts travel as they are, without pickling.

    Raises:
        NodeLostError: the node does not answer.
        DisconnectedError: the connections of this process are closed.
        PipeloadError: of the stage.
    """
    # A pool that is closed, since the scheduler was lost, raises errors of its own.
    with foreign_errors(DisconnectedError, f"The node {place.node} could not be called", "Connect again."):
        try:
            answer = await pool(place.address).actor_execute(
                function=method, actor=place.key, args=[to_serialize(each) for each in arguments], kwargs={}
            )
        except (TimeoutError, OSError, KeyError) as error:
            raise NodeLostError(
                f"The node {place.node} at {place.address} was lost during the call: {first_line(error)}.",
                place.address,
            ) from error
    if answer["status"] == "OK":
        return answer["result"]
    failure = answer["exception"]
    if isinstance(failure, PipeloadError):
        raise failure
    raise ClusterError(
        f"The node {place.node} failed: {first_line(failure)}. Its log has more; run one version of pipeload "
        "everywhere."
    ) from failure
