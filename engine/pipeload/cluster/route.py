"""Which arrays travel from stage to stage. Pure.

A stage takes some of the graph's inputs and of the edges that stages before it have made. Edges that skip a stage
travel along, and each stage passes on only what a later one takes; graph outputs go on to the last stage, which
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipeload.format.manifest import Manifest
from pipeload.format.stages import cut_places, stage
from pipeload.planning.needs import tensor_bytes

__all__ = ["crossing_bytes", "leaving", "shards_of", "stage_places"]


def stage_places(manifest: Manifest) -> list[int]:
    """Places of shards before which the model may be cut for nodes.

    Each stage of a decoder has caches, so that all of them count the same tokens.
    """
    cuts = cut_places(manifest)
    if not manifest.caches:
        return cuts
    taken = manifest.cache_inputs
    blocks = [place for place, shard in enumerate(manifest.shards) if taken & set(shard.inputs)]
    return [place for place in cuts if blocks[0] < place <= blocks[-1]]


def shards_of(manifest: Manifest, begin: int, end: int) -> str:
    """A range of shards as `pipeload.load` takes it."""
    return f"{manifest.shards[begin].name}:{manifest.shards[end - 1].name}"


def leaving(manifest: Manifest, places: Sequence[int]) -> list[frozenset[str]]:
    """Names of the arrays that leave each stage.

    Args:
        manifest: the whole model.
        places: 0, where the other stages begin, and the number of shards.
    """
    stages = [stage(manifest, begin, end) for begin, end in pairwise(places)]
    answer = frozenset(spec.name for spec in manifest.outputs)
    found = []
    for number in range(len(stages)):
        later = {spec.name for each in stages[number + 1 :] for spec in each.inputs}
        found.append(answer | later)
    return found


def crossing_bytes(manifest: Manifest, place: int, dims: Mapping[str, int]) -> int:
    """Bytes that travel in a pass between the stages before and after a place; behind the last shard, the answer.

    Caches do not travel.
    """
    answer = {spec.name: spec for spec in manifest.free_outputs}
    if place == len(manifest.shards):
        return sum(tensor_bytes(spec, dims) for spec in answer.values())
    before, behind = stage(manifest, 0, place), stage(manifest, place, len(manifest.shards))
    caches = manifest.cache_inputs | manifest.cache_outputs
    taken = {spec.name: spec for spec in behind.inputs if spec.name not in caches}
    made = {spec.name: spec for spec in before.outputs if spec.name in answer}
    return sum(tensor_bytes(spec, dims) for spec in (taken | made).values())
