"""A stage: a contiguous range of a model's shards, as a model of its own. Pure.

What the shards of the range take from shards before them are inputs of the stage, and what later ones take from
them are outputs: edges in, edges out. The stage has the KV caches of its own shards. A head stays whole, since its
slices are joined to one output, and so does everything that takes one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeload.errors import ConfigError
from pipeload.format.records import Manifest, Shard

__all__ = ["cut_places", "stage", "stage_of"]

_MOST_NAMES = 12
"""In a message."""


def stage_of(manifest: Manifest, shards: str) -> Manifest:
    """The stage that a caller names.

    Args:
        manifest: the whole model.
        shards: the names of the first and the last shard, as in "block.000:block.011"; either may be left out.

    Raises:
        ConfigError: a name is no shard's, the first comes after the last, or the range parts the head or a cache.
    """
    first, colon, last = shards.partition(":")
    places = {shard.name: place for place, shard in enumerate(manifest.shards)}
    known = f"The shards are {manifest.shards[0].name} to {manifest.shards[-1].name}."
    if not colon:
        raise ConfigError(f"shards is '{shards}'; it must be FIRST:LAST, such as 'block.000:block.011'. {known}")
    for name in (first, last):
        if name and name not in places:
            raise ConfigError(f"shards is '{shards}', and the model has no shard '{name}'. {known}")
    begin = places[first] if first else 0
    end = places[last] + 1 if last else len(manifest.shards)
    if begin >= end:
        raise ConfigError(f"shards is '{shards}', and '{first}' comes after '{last}'. {known}")
    return stage(manifest, begin, end)


def cut_places(manifest: Manifest) -> list[int]:
    """Places of shards before which a model can be cut into stages.

    All but the first one, those within the head, and those that would part a cache: between the first shard that takes
    it, be it only for its length, and the last one that takes or makes it.
    """
    groups = [set(manifest.head.shards)] if manifest.head else []
    groups += [{cache.input, cache.output} for cache in manifest.caches]
    known = [{shard.name, *_taken([shard]), *_made([shard])} for shard in manifest.shards]
    inside: set[int] = set()
    for group in groups:
        meets = [place for place, names in enumerate(known) if not group.isdisjoint(names)]
        inside.update(range(min(meets) + 1, max(meets) + 1))
    return [place for place in range(1, len(manifest.shards)) if place not in inside]


def stage(manifest: Manifest, begin: int, end: int) -> Manifest:
    """The manifest of the shards from `begin` to before `end`; the model's own where these are all.

    Its inputs are the graph's, in their order, then edges; its outputs likewise.

    Raises:
        ConfigError: the range parts the head or a cache.
    """
    if (begin, end) == (0, len(manifest.shards)):
        return manifest
    allowed = {0, len(manifest.shards), *cut_places(manifest)}
    if not {begin, end} <= allowed:
        raise ConfigError(
            f"{manifest.shards[begin].name} to {manifest.shards[end - 1].name} is no stage: the slices of a head stay "
            "together, and so do the shards that take one cache. A stage can begin with "
            f"{_shortened([manifest.shards[place].name for place in sorted(allowed) if place < len(manifest.shards)])}."
        )
    before, own, behind = manifest.shards[:begin], manifest.shards[begin:end], manifest.shards[end:]
    head = manifest.head if manifest.head and manifest.head.shards[0] in {shard.name for shard in own} else None
    made = _made(own) | ({head.output} if head else set())
    taken = _taken(own) - made
    wanted = _taken(behind)
    passed = {spec.name for spec in manifest.edges if spec.name in _made(before)} & taken
    leaving = {spec.name for spec in manifest.edges if spec.name in made and spec.name in wanted}
    outputs = tuple(spec for spec in manifest.outputs if spec.name in made)
    return replace(
        manifest,
        task=f"a stage of {manifest.task}",
        inputs=tuple(spec for spec in (*manifest.inputs, *manifest.edges) if spec.name in taken),
        outputs=outputs + tuple(spec for spec in manifest.edges if spec.name in leaving),
        edges=tuple(spec for spec in manifest.edges if spec.name in made - leaving and spec.name not in passed),
        caches=tuple(cache for cache in manifest.caches if cache.input in taken),
        head=head,
        shards=own,
        verification=tuple(one for one in manifest.verification if one.output in {spec.name for spec in outputs}),
        parity=None,
        draft=None,
    )


def _made(shards: Sequence[Shard]) -> set[str]:
    rows = {lookup.output for shard in shards for lookup in shard.lookups}
    return rows | {name for shard in shards for name in shard.outputs}


def _taken(shards: Sequence[Shard]) -> set[str]:
    indices = {lookup.indices for shard in shards for lookup in shard.lookups}
    return indices | {name for shard in shards for name in shard.inputs}


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{', '.join(names[:_MOST_NAMES])} ..."
