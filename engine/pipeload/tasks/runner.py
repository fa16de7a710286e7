"""The engine's interface to a task.

The tasks see a model only through these protocols, so that tests need only a few lines of numpy, and the engine can
change how it runs passes without changes to the tasks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.pipeline.joining import Padding
from pipeload.pipeline.top_logits import TopLogits
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.model_files import GenerationConfig, ModelConfig, read_config, read_generation_config
from pipeload.tracing.stats import Stats

if TYPE_CHECKING:
    from pipeload.tasks.generate.own_draft import OwnDraft

__all__ = [
    "Array",
    "DecodeState",
    "Decoder",
    "FilesOnly",
    "Runner",
    "config_of",
    "generation_config_of",
    "graph_inputs",
    "made_by_model",
    "once_per_runner",
]

Array = NDArray[np.generic]
Kept = TypeVar("Kept")


class DecodeState(Protocol):
    """The KV caches of one batch of growing sequences. Leaving the context gives their memory back."""

    @property
    def length(self) -> int:
        """Tokens per sequence that the caches hold, padding included."""

    @property
    def nbytes(self) -> int:
        """Memory of the caches."""

    def expect(self, tokens: int) -> None:
        """Plan for this many tokens from now on."""

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""

    def close(self) -> None:
        """Give the memory back. May be called more than once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


State = TypeVar("State", bound=DecodeState)


class Runner(Protocol):
    """A loaded model: its description, and a way to send arrays through it."""

    @property
    def directory(self) -> Path:
        """The sharded model directory."""

    @property
    def manifest(self) -> Manifest:
        """The validated manifest of that directory."""

    @property
    def files(self) -> ModelFiles:
        """Its own files, which are checked when they are read."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All graph outputs for the given graph inputs. Caches that are left out are empty."""

    def run_rows(self, inputs: Mapping[str, Array], padding: Padding, *, passes: int = 0) -> dict[str, Array]:
        """`run` for rows of texts, which may share a batch with those of other callers; `padding` brings them to one
        length, and changes no answer. Callers who have had fewer passes before go first.
        """

    def room_for(self, most_bytes: int) -> AbstractContextManager[None]:
        """Memory under the model's budget for what the body makes; see `Model.room_for`."""


@dataclass(frozen=True, eq=False)
class FilesOnly:
    """A model directory of which only the tokenizer and the settings are used: a runner that runs nothing."""

    directory: Path
    manifest: Manifest
    files: ModelFiles

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Not for such a model."""
        raise NotImplementedError

    def run_rows(self, inputs: Mapping[str, Array], padding: Padding, *, passes: int = 0) -> dict[str, Array]:
        """Not for such a model."""
        raise NotImplementedError

    def room_for(self, most_bytes: int) -> AbstractContextManager[None]:  # noqa: ARG002 - there is nothing to keep to
        """No budget, so no room to make."""
        return nullcontext()


class Decoder(Runner, Protocol[State]):
    """A runner that can also extend sequences; each engine has its own kind of state."""

    @property
    def stats(self) -> Stats:
        """The figures of all passes so far."""

    @property
    def own_draft(self) -> OwnDraft | None:
        """The copy of the model that guesses its tokens; None where there is none, or none was asked for."""

    def step(self, inputs: Mapping[str, Array], state: State, *, positions: int = 1) -> NDArray[np.float32]:
        """Run the model over the new tokens and put their keys and values into the state.

        Returns the logits of the last positions only, `[batch, positions, vocabulary]`.
        """

    def step_top(
        self, inputs: Mapping[str, Array], state: State, top: int, *, positions: int = 1
    ) -> Sequence[Sequence[TopLogits]]:
        """`step` that keeps only the largest logits of each sequence's positions."""

    def new_state(self, capacity: int = 0) -> State:
        """An empty state. `capacity` is the number of tokens that the engine plans for."""


def graph_inputs(runner: Runner, offered: Mapping[str, Array]) -> dict[str, Array]:
    """The offered arrays that the graph takes, in the graph's dtypes.

    Raises:
        ConfigError: the graph takes an input that is not offered.
    """
    specs = runner.manifest.free_inputs
    if missing := [spec.name for spec in specs if spec.name not in offered]:
        raise ConfigError(
            f"The model takes {_quoted(missing)}, and this call makes only {_quoted(offered)}. "
            "Pass all inputs to model.run instead."
        )
    return {spec.name: offered[spec.name].astype(spec.dtype, copy=False) for spec in specs}


def made_by_model(name: str, output: Array) -> AbstractContextManager[None]:
    """Wraps the use of an output: raises ConfigError if its shape does not fit the task."""
    return foreign_errors(
        ConfigError,
        f"The model's output '{name}' has the shape {list(output.shape)}, which its task cannot use",
        "Use model.run, or export the model again with the right --task.",
    )


def once_per_runner(make: Callable[[Runner], Kept]) -> Callable[[Runner], Kept]:
    """`make`, called once for every runner; what it returned lives as long as the runner does."""
    kept: WeakKeyDictionary[Runner, Kept] = WeakKeyDictionary()
    lock = threading.Lock()

    @wraps(make)
    def look_up(runner: Runner) -> Kept:
        # One lock, held while making too: two threads that start with the same model must not load a tokenizer twice,
        # because its memory counts.
        with lock:
            if runner not in kept:
                kept[runner] = make(runner)
            return kept[runner]

    return look_up


@once_per_runner
def config_of(runner: Runner) -> ModelConfig:
    """The settings from the model's `config.json`. Raises ShardError if it is damaged."""
    return read_config(runner.files)


@once_per_runner
def generation_config_of(runner: Runner) -> GenerationConfig:
    """The settings from the model's `generation_config.json`. Raises ShardError if it is damaged."""
    return read_generation_config(runner.files)


def _quoted(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
