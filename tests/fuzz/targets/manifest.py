"""Manifests: what is read is what is written, and what is valid can be planned with."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
from tests.fuzz.corpora import CORPUS, known
from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.format import manifest as manifests
from pipeload.format.caches import can_be_cut, growth, length_input, past_symbols
from pipeload.format.graphs import location_of
from pipeload.planning.footprint import session_bytes
from pipeload.planning.needs import Needs, pass_needs, planning_dims
from pipeload.planning.planner import make_plan
from pipeload.planning.profile import Profile
from pipeload.storage.digests import ranges_of
from pipeload.storage.weights import Storage

_PATH = Path("/fuzz/pipeload.json")
_EACH = 4
_PROFILE = Profile(process_bytes=100_000_000, cores=2)


def _parse(data: bytes) -> manifests.Manifest:
    return manifests.parse(data, _PATH)


def _prepare() -> Trial:
    def trial(data: bytes) -> bool:
        found = _parse(data)
        written = msgspec.json.encode(found)
        if _parse(written) != found:
            raise Wrong("what is written of it reads as something else")
        # Python's own reader takes longer than all else. What is no field of the format is skipped, whatever it is.
        if crc32(data) % _EACH == 0 and not _agree(found, json.loads(data.decode(errors="replace"))):
            raise Wrong("a field has another value than in the JSON")
        return True

    return trial


def _agree(found: Any, given: Any) -> bool:
    """Whether a value is what Python's own reader of JSON has found."""
    if is_dataclass(found):
        return all(
            _agree(getattr(found, field.name), given[field.name]) for field in fields(found) if field.name in given
        )
    if isinstance(found, tuple):
        return len(found) == len(given) and all(map(_agree, found, given))
    if isinstance(found, dict):
        return found.keys() == given.keys() and all(_agree(value, given[key]) for key, value in found.items())
    return bool(found == given)


def _prepare_plans() -> Trial:
    def trial(data: bytes) -> bool:
        manifest = _parse(data)
        for specs in (manifest.inputs, manifest.outputs):
            manifests.match_dims(specs, {spec.name: (3,) * len(spec.shape) for spec in specs})
        dims = planning_dims(manifest)
        if manifest.caches:
            past_symbols(manifest)
            can_be_cut(manifest)
        for shard in manifest.shards:
            session_bytes(shard, 2)
            location_of(shard.weights.path if shard.weights else "x", shard.graph.path)
            if shard.memory_bytes < shard.nbytes:
                raise Wrong("weights that are loaded are fewer bytes than those of the file")
        ranges_of(manifest)
        Storage(Path("/fuzz"), manifest)
        needed, held = pass_needs(manifest, dims)
        if not held >= 0 or needed < 0:
            raise Wrong("a pass needs a negative number of bytes", needed)
        budget = 2 * _PROFILE.process_bytes + needed + 4 * manifest.weight_bytes
        plan = make_plan(manifest, _PROFILE, budget_bytes=budget, needs=Needs(pass_bytes=needed, held_bytes=held))
        if plan.peak_bytes > budget:
            raise Wrong("a plan is above the budget", f"{plan.peak_bytes} > {budget}")
        if manifest.caches:
            growth(manifest)
            length_input(manifest)
        return True

    return trial


TARGETS = (
    Target(name="manifest", what="manifests", prepare=_prepare, mutate=json_of),
    Target(
        name="plan",
        what="plans of valid manifests",
        prepare=_prepare_plans,
        seeds=lambda: known(CORPUS, "manifest"),
        mutate=json_of,
        share=0.5,
    ),
)
