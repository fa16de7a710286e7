"""A placement fits the nodes' budgets, or the error names the budget with which there is one."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.engine.still_machine import PROFILE

import pipeload
from pipeload.cluster.costs import ASSUMED, CALL_S, Member, copying_s
from pipeload.cluster.links import PIECE_BYTES, Link
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import by_hand, place
from pipeload.cluster.route import leaving, stage_places
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage
from pipeload.planning import planner
from pipeload.planning.placement import Placement, Segment
from pipeload.planning.planner import Plan

MB = 1_000_000


def member(
    name: str, budget_bytes: int, *, trusted: bool = True, process: str = "", models: tuple[str, ...] = ("sha256",)
) -> Member:
    offer = Offer(
        name=name,
        process=process or name,
        budget_bytes=budget_bytes,
        process_bytes=PROFILE.process_bytes,
        cores=PROFILE.cores,
        trusted=trusted,
        models={sha256: sha256 for sha256 in models},
        fetched_bytes=0,
    )
    return Member(address=f"tcp://{name}", offer=offer, speed=PROFILE)


@pytest.fixture
def manifest(toy_large: Path) -> Manifest:
    """Eight blocks of 4.2 MB."""
    return manifests.read(toy_large)


def test_a_model_that_one_node_streams_is_spread_until_nothing_is_read(manifest: Manifest) -> None:
    one = place(manifest, [member("a", 232 * MB)])
    assert one.segments[0].read_s > 0
    two = place(manifest, [member("a", 252 * MB), member("b", 252 * MB)], latency_share=0.0)
    assert two.period_s < one.period_s


def test_the_smallest_budget_in_the_message_works_and_less_does_not(manifest: Manifest) -> None:
    names = ("a", "b")
    with pytest.raises(pipeload.ClusterError, match="does not fit") as refused:
        place(manifest, [member(name, 201 * MB) for name in names])
    found = re.search(r": (\d+) bytes", str(refused.value))
    assert found
    least = int(found[1])
    assert place(manifest, [member(name, least) for name in names]).segments
    with pytest.raises(pipeload.ClusterError):
        place(manifest, [member(name, least - 5 * MB) for name in names])


def test_what_sees_texts_and_answers_stays_on_trusted_nodes(manifest: Manifest) -> None:
    large = member("large", 900 * MB, trusted=False)
    found = place(manifest, [large, member("trusted", 240 * MB)])
    private = {0, len(manifest.shards) - 1}
    for segment in found.segments:
        if segment.node == "large":
            assert not private & set(range(segment.begin, segment.end))
    with pytest.raises(pipeload.ClusterError, match="trusted nodes only"):
        place(manifest, [large])


def test_equal_stages_are_planned_once_and_not_again_where_a_node_is_lost(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning one takes a tenth of a second, and eight blocks alone have 36 ranges on each of the nodes."""
    planned: list[str] = []

    def plan(own: Manifest, *arguments: Any, **options: Any) -> Plan:
        planned.append(own.shards[0].name)
        return make_plan(own, *arguments, **options)

    make_plan = planner.make_plan
    monkeypatch.setattr(planner, "make_plan", plan)
    members = [member(name, 240 * MB) for name in "abc"]
    before = place(manifest, members)
    places = [0, *stage_places(manifest), len(manifest.shards)]
    kinds = [(shard.role, shard.nbytes) for shard in manifest.shards]
    ranges = [(begin, end) for number, begin in enumerate(places) for end in places[number + 1 :]]
    different = {tuple(sorted(kinds[begin:end])) for begin, end in ranges}
    assert len(different) < len(ranges) / 2
    assert len(planned) == len(members) * len(different)
    planned.clear()
    lost = before.segments[0].node
    after = place(manifest, [one for one in members if one.offer.name != lost])
    assert lost not in {segment.node for segment in after.segments}
    assert planned == []


def _fetching(budget_bytes: int, disk_bytes: int) -> Member:
    made = member("fetching", budget_bytes)
    return replace(made, fetches=True, offer=replace(made.offer, fetched_bytes=disk_bytes))


def test_a_stage_fits_the_disk_of_a_node_that_has_to_fetch(manifest: Manifest) -> None:
    small, owner = member("owner", 201 * MB), member("owner", 232 * MB)
    block = next(shard for shard in manifest.shards if shard.role == "block")
    used = 0
    for blocks in (9, 5, 3):
        found = place(manifest, [owner, _fetching(900 * MB, blocks * block.nbytes)])
        fetched = [one for one in found.segments if one.node == "fetching"]
        used += len(fetched)
        shards = [shard for one in fetched for shard in manifest.shards[one.begin : one.end]]
        assert sum(shard.nbytes for shard in shards) <= blocks * block.nbytes
    assert used
    with pytest.raises(pipeload.ClusterError, match="does not fit the nodes"):
        place(manifest, [small, _fetching(900 * MB, disk_bytes=1)])
    with pytest.raises(pipeload.ClusterError, match="larger --fetch"):
        by_hand(manifest, [_fetching(900 * MB, disk_bytes=1)], {"fetching": ":"})


def test_a_node_that_has_to_fetch_is_used_where_that_pays(manifest: Manifest) -> None:
    owner = member("owner", 232 * MB)
    fetching = _fetching(900 * MB, disk_bytes=900 * MB)
    assert "fetching" in {segment.node for segment in place(manifest, [owner, fetching]).segments}
    # As good as the other one is not enough.
    enough = member("owner", 900 * MB)
    assert [segment.node for segment in place(manifest, [fetching, enough]).segments] == ["owner"]
    # Without another one that has room, it is needed.
    small = member("owner", 201 * MB)
    assert "fetching" in {segment.node for segment in place(manifest, [small, fetching]).segments}


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
    offer = member("a", MB).offer
    assert Offer.heard(offer.told()) == offer
    assert replace(offer, name="b") != offer
    with pytest.raises(pipeload.ClusterError, match="one version of pipeload"):
        Offer.heard({"name": "a"})


def test_copying_takes_the_caches_that_change_their_node(exported_llama: Path) -> None:
    """By the slower of two stages that take theirs at the same time; within a node only the messages count."""
    manifest = manifests.read(exported_llama)
    count, cuts = len(manifest.shards), stage_places(manifest)
    first, last = cuts[0], cuts[-1]
    assert first < last
    dims = {**dict.fromkeys(manifest.dims, 1), "batch_size": 2}
    slow = {frozenset(("a", "c")): Link(latency_s=0.5, bytes_per_s=1000.0)}

    def on(*ranges: tuple[str, int, int]) -> Placement:
        times = {"run_s": 1.0, "read_s": 0.0, "send_s": 0.0}
        return Placement(segments=tuple(Segment(node=node, begin=b, end=e, **times) for node, b, e in ranges))

    def seconds(before: Placement, after: Placement, length: int = 300) -> float:
        return copying_s(manifest, before, after, slow, dims=dims, length=length)

    def sizes(begin: int, end: int, length: int = 300) -> list[int]:
        own = stage(manifest, begin, end)
        rows = [spec.shape for spec in own.inputs if spec.name in own.cache_inputs]
        return [2 * int(shape[1]) * length * int(shape[3]) * 4 for shape in rows]

    whole = on(("a", 0, count))
    assert seconds(whole, whole) == 0.0
    assert seconds(whole, on(("c", 0, count))) == pytest.approx(
        sum(-(-n // PIECE_BYTES) * CALL_S + 0.5 + n / 1000 for n in sizes(0, count))
    )
    # The beginning stays on its node, as part of another stage; the end goes over an unknown link.
    moved = sizes(last, count)
    over = sum(-(-n // PIECE_BYTES) * CALL_S + n / ASSUMED.bytes_per_s for n in moved)
    within = sum(-(-n // PIECE_BYTES) * CALL_S for n in sizes(0, last))
    assert seconds(whole, on(("a", 0, last), ("b", last, count))) == pytest.approx(max(over, within))
    assert seconds(on(("a", 0, first), ("b", first, count)), on(("a", 0, first), ("c", first, count))) < seconds(
        on(("a", 0, first), ("b", first, count)), on(("c", 0, first), ("b", first, count))
    )
    assert seconds(whole, on(("c", 0, count)), 600) > seconds(whole, on(("c", 0, count)), 300)
