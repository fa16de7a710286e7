"""Inputs that hypothesis draws, by their types: they join the known ones, and are mutated as these are."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import hypothesis
import msgspec
from hypothesis import strategies
from tests.fuzz.mutations import json_bytes

from pipeload.format.manifest import Manifest
from pipeload.planning.profile import Profile

__all__ = ["drawn"]

_COUNT = 20
_MOST_BYTES = 6000

_JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats(allow_nan=False)
    | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(max_size=9), inner),
    max_leaves=20,
)  # fmt: skip
_SIZES = strategies.from_regex(re.compile(r"\s*[0-9]{1,22}(\.[0-9]{1,22})?\s*[KMGTkmgt]?[Ii]?[Bb]?\s*"), fullmatch=True)
_ENTRIES = strategies.fixed_dictionaries(
    {
        "dtype": strategies.sampled_from(["F32", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "F4", "x"]),
        "shape": strategies.lists(strategies.integers(0, 5), max_size=4),
        "data_offsets": strategies.lists(strategies.integers(0, 600), min_size=2, max_size=2).map(sorted),
    }
)


def _profile(profile: Profile) -> dict[str, Any]:
    fields = msgspec.to_builtins(profile, str_keys=True)
    del fields["process_bytes"]
    return {"format": 1, "profile": fields}


def _strategy(name: str) -> strategies.SearchStrategy[bytes] | None:
    match name:
        case "sizes":
            return _SIZES.map(str.encode)
        case "manifest":
            return strategies.from_type(Manifest).map(partial(msgspec.to_builtins, enc_hook=dict)).map(json_bytes)
        case "profile":
            return strategies.from_type(Profile).map(_profile).map(json_bytes)
        case "safetensors" | "checkpoint":
            return strategies.dictionaries(strategies.text(max_size=6), _ENTRIES, max_size=4).map(json_bytes)
        case "generation_config" | "config" | "preprocessor_config" | "tokenizer_rules":
            return strategies.dictionaries(strategies.text(max_size=9), _JSON, max_size=6).map(json_bytes)
        case _:
            return None


def drawn(name: str, seed: int) -> list[bytes]:
    """The inputs for a target, the same for the same seed; none for those that hypothesis has no types of."""
    strategy = _strategy(name)
    found: list[bytes] = []
    if strategy is None:
        return found

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_COUNT,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def draw(data: bytes) -> None:
        found.append(data)

    draw()
    return [data for data in found if len(data) <= _MOST_BYTES]
