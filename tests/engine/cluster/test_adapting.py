"""A model on real nodes moves when they change, and its answers stay those of one machine.

What the nodes tell is changed on its way to the client; the stages, the calls and the move are real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.cluster.conftest import BUDGETS
from tests.engine.cluster.processes import Cluster, line
from tests.engine.cluster.test_answers import at_a_look, references
from tests.engine.harness import PATIENCE_S, Background, assert_close

import pipeload
from pipeload.cluster import costs, placing
from pipeload.cluster.connection import Change, Connection
from pipeload.cluster.model import ClusterModel
from pipeload.cluster.ring import Ring
from pipeload.cluster.route import shards_of, stage_places
from pipeload.format import manifest as manifests
from pipeload.planning import adapting
from pipeload.planning.placement import Placement

MB = 1_000_000


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks in a row are enough, one after the other."""
    monkeypatch.setattr("pipeload.cluster.watch._INTERVAL_S", 0.1)
    monkeypatch.setattr(adapting, "_LOOKS", 2)
    monkeypatch.setattr(adapting, "_FORCED_LOOKS", 2)


class _Changed:
    """What the nodes tell, changed on its way.

    Attributes:
        hidden: names of nodes that have not joined yet.
        short: name -> bytes that a node may use now.
    """

    def __init__(self, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hidden: set[str] = set()
        self.short: dict[str, int] = {}
        watch = connection._watch
        look = watch.look

        async def changed() -> None:
            await look()
            for address, offer in [*watch.offers.items()]:
                if offer.name in self.hidden:
                    del watch.offers[address]
                if offer.name in self.short:
                    watch.budgets[address] = self.short[offer.name]

        monkeypatch.setattr(watch, "look", changed)


def on(placement: Placement | None) -> list[str]:
    assert placement is not None
    return [segment.node for segment in placement.segments]


def wait_for_move(connection: Connection, model: ClusterModel) -> None:
    """Until the model has moved once more, and what it has left is closed."""
    before = len(model.reconfigurations)
    at_a_look(connection, lambda: len(model.reconfigurations) > before)


def kept_change(connection: Connection, why: str) -> Change:
    """The change with this reason, once the scheduler has heard of it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := [one for one in connection.reconfigurations() if one.why == why]):
        assert time.monotonic() < deadline_s
    return found[-1]


def test_a_node_that_joins_is_used_and_a_text_goes_on(
    connection: Connection, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tokens; none is wrong, missing or doubled."""
    prompt, options = [5, 6, 7, 8], {"max_new_tokens": 10, "do_sample": True, "seed": 3}
    with pipeload.load(models / "llama") as alone:
        expected = alone.generate(prompt, **options).token_ids
    changed = _Changed(connection, monkeypatch)
    changed.hidden = {"middle", "large"}
    connection.plan("llama")
    # By its profile the node that is there takes ten times as long as the one that joins.
    for key, member in [*connection._nodes.known.items()]:
        speed = costs._slowed(connection.manifest("llama"), member.speed, 10.0, 10.0)
        connection._nodes.known[key] = replace(member, speed=speed, turns={}, others={})
    told: list[int] = []

    with connection.load("llama") as model:
        assert on(model.placement) == ["small"]

        def on_token(token: pipeload.NewToken) -> None:
            told.append(token.token_id)
            if len(told) == 4:
                changed.hidden = {"middle"}
                wait_for_move(connection, model)

        assert model.generate(prompt, on_token=on_token, **options).token_ids == expected
        assert tuple(told) == expected
        assert on(model.placement) == ["large"]
        (change,) = model.reconfigurations
        assert (on(change.before), on(change.after)) == (["small"], ["large"])
        assert "large has joined" in change.why
        assert model.replacements == 0
        known = kept_change(connection, change.why)
        assert known.model == "llama"
        assert known.after is not None
        assert "large" in known.after


def test_a_node_that_loses_memory_is_relieved(
    connection: Connection, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = references(models / "bert")[1]
    with pipeload.load(models / "bert") as alone:
        expected = alone.run(inputs)
    changed = _Changed(connection, monkeypatch)
    with connection.load("bert") as model:
        (first,) = on(model.placement)

        def items() -> Iterator[dict[str, Any]]:
            yield inputs
            changed.short = {first: 100 * MB}
            wait_for_move(connection, model)
            for _ in range(3):
                yield inputs

        made = list(model.run_many(items()))
        assert len(made) == 4
        for one in made:
            assert_close(one, expected, 1e-5)
        assert first not in on(model.placement)
        assert "may use" in model.reconfigurations[0].why
    assert_stages(connection, lambda stages: not stages)


def assert_stages(connection: Connection, holds: Callable[[list[Any]], bool]) -> None:
    """All stages before and after the move are closed in the end."""
    closed = threading.Event()
    watch = connection._watch

    def look(_: object) -> None:
        if holds([stage for stages in watch.facts.values() for stage in stages]):
            closed.set()

    watch.listeners.add(look)
    try:
        assert closed.wait(PATIENCE_S), watch.facts
    finally:
        watch.listeners.discard(look)


def test_a_model_whose_caller_has_placed_it_stays_there(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted: list[ClusterModel] = []
    monkeypatch.setattr(connection, "_adapt", lambda model, *_: adapted.append(model))
    with connection.load("bert", stages={"small": ":"}):
        assert adapted == []
    with connection.load("bert") as model:
        assert adapted == [model]


@pytest.mark.survey
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("after", [("small", "large"), ("small", "middle"), ("large", "small", "middle")])
def test_a_text_goes_on_wherever_the_model_is_cut(
    connection: Connection, models: Path, after: tuple[str, ...], name: str, together: bool
) -> None:
    """On nodes that have another stage of it already, and on those that keep theirs."""
    prompt, options = [5, 6, 7, 8], {"max_new_tokens": 10, "do_sample": True, "seed": 3}
    with pipeload.load(models / name) as alone:
        expected = alone.generate(prompt, **options).token_ids
    manifest = manifests.read(models / name)
    names, cuts = [shard.name for shard in manifest.shards], stage_places(manifest)
    first = {"small": f":{names[cuts[0] - 1]}", "large": f"{names[cuts[0]]}:"}
    places = [0, *cuts[-(len(after) - 1) :], len(names)]
    second = {
        node: f"{names[begin]}:{names[end - 1]}"
        for node, begin, end in zip(after, places[:-1], places[1:], strict=True)
    }
    told: list[int] = []
    with connection.load(name, stages=first) as model:

        def on_token(token: pipeload.NewToken) -> None:
            told.append(token.token_id)
            if len(told) == 4:
                move(connection, model, name, second, together=together)

        assert model.generate(prompt, on_token=on_token, **options).token_ids == expected
        assert tuple(told) == expected
        assert on(model.placement) == [*after]
    assert_stages(connection, lambda stages: not stages)


def move(
    connection: Connection, model: ClusterModel, name: str, stages: dict[str, str], *, together: bool = True
) -> None:
    """Move a model to stages that are chosen by hand."""
    sha256, _ = connection._nodes.named(name)
    members = connection.loop.ask(connection._nodes.speeds(sha256, connection._nodes.candidates(sha256)))
    placement = placing.by_hand(model.manifest, members, stages)

    def prepare(before: Ring) -> Ring:
        return Ring(connection._client, connection._watch, model.manifest, sha256, name, [], placement, members, before)

    assert model.rings.move(model.rings.present, prepare, "Asked.", together=together)


_SHORT_NODE = """
import sys
from pathlib import Path
import pipeload.cluster.node, pipeload.machine.memory, pipeload.opening
from pipeload.cli import app

class Memory:
    def __call__(self):
        return int(Path({free!r}).read_text())

pipeload.cluster.node.FreeMemory = pipeload.opening.FreeMemory = Memory
sys.argv = ["pipeload", *{words!r}]
app()
"""
"""A node on a machine whose free memory is what a file says."""


@pytest.mark.survey
def test_a_node_whose_memory_becomes_short_is_left_for_one_that_has_joined(
    cluster: Cluster, models: Path, tmp_path: Path
) -> None:
    """Both as the nodes themselves tell it; calls go on all the time."""
    free, ended = tmp_path / "free", threading.Event()
    free.write_text("8000000000")
    inputs = references(models / "bert")[1]
    with pipeload.load(models / "bert") as alone:
        expected = alone.run(inputs)
    for name in [*cluster.nodes]:
        cluster.kill(name)
    board = cluster.begun_program(_SHORT_NODE.format(free=str(free), words=cluster._node("board", "500MB")))
    try:
        line(board)
        with pipeload.connect(cluster.address) as connection, connection.load("bert") as model:
            assert on(model.placement) == ["board"]

            def calls() -> list[Any]:
                made = []
                while not ended.is_set():
                    made.append(model.run(inputs))
                return made

            running = Background(calls)
            cluster.start({"middle": BUDGETS["middle"]})
            free.write_text("100000000")
            wait_for_move(connection, model)
            ended.set()
            made = running.end()
            assert on(model.placement) == ["middle"]
            assert "the node board may use" in model.reconfigurations[0].why.lower()
            for one in made:
                assert_close(one, expected, 1e-5)
            assert (
                kept_change(connection, model.reconfigurations[-1].why).after
                == f"middle {shards_of(model.manifest, 0, len(model.manifest.shards))}"
            )
    finally:
        ended.set()
        board.kill()
        board.communicate()
