"""Checks of the arguments that callers pass to the tasks, before any use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from pipeload.errors import ConfigError
from pipeload.format.manifest import Manifest

__all__ = ["check_capacity", "check_positive", "check_several", "is_whole"]

Item = TypeVar("Item")


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def check_capacity(manifest: Manifest, capacity: object) -> None:
    """Raise ConfigError unless a model has caches, and this is a number of tokens to plan for."""
    if not is_whole(capacity, 0):
        raise ConfigError(f"capacity is {capacity!r:.80}; it must be a whole number of tokens, not below 0.")
    if not manifest.caches:
        raise ConfigError(f"This {manifest.task} model has no KV cache, so it cannot decode step by step.")


def check_positive(name: str, value: object) -> None:
    """Raise ConfigError unless an argument is a whole number of at least 1."""
    if not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} must be a whole number from 1 on, not {value!r:.80}.")
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}.")


def check_several(
    texts: Sequence[Item], name: str = "Texts", wanted: str = "a string or a sequence of strings"
) -> None:
    """Raise ConfigError unless the texts form a sequence, such as a list; a single string is none."""
    # Python counts an array or a column of a table as no Sequence, but it serves as one.
    row = hasattr(texts, "__len__") and hasattr(texts, "__getitem__") and getattr(texts, "shape", None) != ()
    if not row or isinstance(texts, Mapping | str | bytes | bytearray):
        raise ConfigError(f"{name} must be {wanted}, not {type(texts).__name__}: {texts!r:.80}. Put them into a list.")
