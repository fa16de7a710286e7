"""A placement fits the nodes' budgets, or the error names the budget with which there is one."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tests.engine.still_machine import PROFILE

import pipeload
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import Member, place
from pipeload.cluster.route import leaving, stage_places
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage

_MB = 1_000_000


def _member(name: str, budget_bytes: int, *, trusted: bool = True) -> Member:
    offer = Offer(
        name=name,
        process=name,
        budget_bytes=budget_bytes,
        process_bytes=PROFILE.process_bytes,
        cores=PROFILE.cores,
        trusted=trusted,
        models={},
    )
    return Member(address=f"tcp://{name}", offer=offer, speed=PROFILE)


@pytest.fixture
def manifest(toy_large: Path) -> Manifest:
    """Eight blocks of 4.2 MB."""
    return manifests.read(toy_large)


def test_a_model_that_one_node_streams_is_spread_until_nothing_is_read(manifest: Manifest) -> None:
    one = place(manifest, [_member("a", 232 * _MB)])
    assert one.segments[0].read_s > 0
    two = place(manifest, [_member("a", 252 * _MB), _member("b", 252 * _MB)], latency_share=0.0)
    assert two.period_s < one.period_s


def test_the_smallest_budget_in_the_message_works_and_less_does_not(manifest: Manifest) -> None:
    names = ("a", "b")
    with pytest.raises(pipeload.ClusterError, match="does not fit") as refused:
        place(manifest, [_member(name, 201 * _MB) for name in names])
    found = re.search(r": (\d+) bytes", str(refused.value))
    assert found
    least = int(found[1])
    assert place(manifest, [_member(name, least) for name in names]).segments
    with pytest.raises(pipeload.ClusterError):
        place(manifest, [_member(name, least - 5 * _MB) for name in names])


def test_what_sees_texts_and_answers_stays_on_trusted_nodes(manifest: Manifest) -> None:
    large = _member("large", 900 * _MB, trusted=False)
    found = place(manifest, [large, _member("trusted", 240 * _MB)])
    private = {0, len(manifest.shards) - 1}
    for segment in found.segments:
        if segment.node == "large":
            assert not private & set(range(segment.begin, segment.end))
    with pytest.raises(pipeload.ClusterError, match="trusted nodes only"):
        place(manifest, [large])


def test_each_stage_gets_all_that_it_takes(exported: Path) -> None:
    """Of the caller's inputs, and of what stages before it let through, wherever the model is cut."""
    manifest = manifests.read(exported)
    cuts = stage_places(manifest)
    places = [0, *cuts, len(manifest.shards)]
    stages = [stage(manifest, begin, end) for begin, end in pairwise(places)]
    there = {spec.name for spec in manifest.inputs}
    for own, passes in zip(stages, leaving(manifest, places), strict=True):
        assert {spec.name for spec in own.inputs} <= there
        there = (there | {spec.name for spec in own.outputs}) & passes
    assert there == {spec.name for spec in manifest.outputs}


def test_every_stage_of_a_decoder_has_caches(exported_generator: Path) -> None:
    manifest = manifests.read(exported_generator)
    places = [0, *stage_places(manifest), len(manifest.shards)]
    assert all(stage(manifest, begin, end).caches for begin, end in pairwise(places))


def test_offers_of_another_version_are_refused() -> None:
    offer = _member("a", _MB).offer
    assert Offer.heard(offer.told()) == offer
    assert replace(offer, name="b") != offer
    with pytest.raises(pipeload.ClusterError, match="one version of pipeload"):
        Offer.heard({"name": "a"})
