"""A node that dies costs no answer and no token: calls are tried again on the nodes that are left, or end clearly."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engine.cluster.conftest import BUDGETS
from tests.engine.cluster.processes import Cluster, line
from tests.engine.cluster.test_answers import at_a_look, references, stages_on, wait_until
from tests.engine.harness import PATIENCE_S, Background, Gate, assert_close

import pipeload
from pipeload.cluster.connection import Connection
from pipeload.cluster.settings import LOST_AFTER_S


@pytest.mark.parametrize("lost", ["small", "large"])
def test_a_text_goes_on_from_its_tokens_on_the_nodes_that_are_left(
    cluster: Cluster, connection: Connection, models: Path, lost: str
) -> None:
    """The node dies between two tokens: none is wrong, missing or doubled."""
    prompt, options = [5, 6, 7, 8], {"max_new_tokens": 12, "do_sample": True, "seed": 3}
    with pipeload.load(models / "llama") as alone:
        expected = alone.generate(prompt, **options).token_ids
    told: list[int] = []

    def on_token(token: pipeload.NewToken) -> None:
        told.append(token.token_id)
        if len(told) == 5:
            cluster.kill(lost)

    with connection.load("llama", stages=stages_on(models / "llama", "small", "large")) as model:
        assert model.generate(prompt, on_token=on_token, **options).token_ids == expected
        assert tuple(told) == expected
        assert lost not in [segment.node for segment in model.placement.segments]
        assert model.replacements == 1


def test_passes_go_on_where_a_node_is_left_that_has_the_model(
    cluster: Cluster, connection: Connection, models: Path
) -> None:
    """A node that its user stops is lost as one that dies is."""
    inputs = references(models / "bert")[1]
    with pipeload.load(models / "bert") as alone:
        expected = alone.run(inputs)
    with connection.load("bert", stages=stages_on(models / "bert", "small", "large")) as model:
        many = model.run_many(inputs for _ in range(6))
        made = [next(many)]
        cluster.stop("small")
        made += many
        assert len(made) == 6
        for one in made:
            assert_close(one, expected, 1e-5)


def test_without_a_node_each_call_has_one_clear_error(cluster: Cluster, connection: Connection, models: Path) -> None:
    inputs = references(models / "bert")[0]
    with connection.load("bert") as model:
        model.run(inputs)
        for name in [*cluster.nodes]:
            cluster.kill(name)
        for _ in range(2):
            with pytest.raises(pipeload.ClusterError, match=r"lost|No node"):
                model.run(inputs)


def test_a_model_outlives_the_nodes_that_had_all_of_it(
    cluster: Cluster, connection: Connection, models: Path, tmp_path: Path
) -> None:
    """Two nodes have fetched a half each; a third one, which comes later, takes all from both."""
    inputs = references(models / "llama")
    with pipeload.load(models / "llama") as alone:
        expected = [alone.run(each) for each in inputs]
        text = alone.generate([5, 6, 7], max_new_tokens=4).token_ids

    def begin(name: str) -> None:
        (tmp_path / name).mkdir()
        cluster.start({name: "400MB"}, "--fetch", "10MB", models=tmp_path / name)

    def check(stages: Mapping[str, str] | None) -> None:
        with connection.load("llama", stages=stages) as model:
            for one, other in zip([model.run(each) for each in inputs], expected, strict=True):
                assert_close(one, other, 1e-5)
            assert model.generate([5, 6, 7], max_new_tokens=4).token_ids == text

    try:
        for name in ("half", "rest"):
            begin(name)
        check(stages_on(models / "llama", "half", "rest"))
        for name in BUDGETS:
            cluster.kill(name)
        begin("third")
        watch = connection._watch
        at_a_look(connection, lambda: len(watch.offers) == 3 and sum(map(bool, watch.fetched.values())) == 2)
        check(stages_on(models / "llama", "third"))
        check(None)
    finally:
        for name in {"half", "rest", "third"} & cluster.nodes.keys():
            cluster.kill(name)
    (fetched,) = (tmp_path / "third" / ".fetched").iterdir()
    assert {path.name for path in (fetched / "shards").iterdir()} == {
        path.name for path in (models / "llama" / "shards").iterdir()
    }


def test_a_node_that_does_not_tell_its_speed_takes_no_part(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, silent = connection._nodes.call, {node.address for node in connection.nodes() if node.offer.name != "middle"}

    async def cut_off(address: str, operation: str, arguments: Mapping[str, Any]) -> Any:
        if address in silent:
            raise pipeload.ClusterError(f"The node at {address} does not answer.")
        return await call(address, operation, arguments)

    monkeypatch.setattr(connection._nodes, "call", cut_off)
    # The manifest, too, comes from the first node that answers.
    assert [segment.node for segment in connection.plan("bert").segments] == ["middle"]
    silent |= {node.address for node in connection.nodes()}
    connection._nodes.known.clear()
    with pytest.raises(pipeload.ClusterError, match="does not answer"):
        connection.plan("bert")


def test_a_model_that_is_dropped_ends_its_stages(connection: Connection, models: Path) -> None:
    model = connection.load("bert", stages=stages_on(models / "bert", "small", "large"))
    wait_until(connection, lambda stages: len(stages) == 2)
    del model
    gc.collect()
    wait_until(connection, lambda stages: not stages)


def test_a_program_that_leaves_its_connection_open_ends(cluster: Cluster) -> None:
    program = (
        f"import pipeload; cluster = pipeload.connect({cluster.address!r})\n"
        "model = cluster.load('bert'); print('open', flush=True)"
    )
    client = cluster.begun_program(program)
    try:
        assert line(client) == "open"
        assert client.wait(PATIENCE_S) == 0
    finally:
        client.kill()
        client.communicate()


@pytest.mark.survey
def test_a_node_that_hangs_is_lost_within_a_bounded_time(
    cluster: Cluster, connection: Connection, models: Path
) -> None:
    """It takes part in no further placement, though its connections stay open."""
    inputs = references(models / "bert")[0]
    with connection.load("bert", stages=stages_on(models / "bert", "small", "large")) as model:
        expected = model.run(inputs)
        os.kill(cluster.nodes["large"].pid, signal.SIGSTOP)
        try:
            call = Background(model.run, inputs)
            call.join(3 * LOST_AFTER_S)
            assert not call.is_alive(), "the call waits for a node that does not answer"
            assert_close(call.end(), expected, 1e-5)
            assert "large" not in [segment.node for segment in model.placement.segments]
        finally:
            cluster.kill("large")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_call_that_is_late_costs_the_nodes_nothing(
    cluster: Cluster, connection: Connection, models: Path, name: str
) -> None:
    """A node hangs until the deadline has passed, and no longer: it is not lost, and forgets the call."""
    with connection.load(name, stages=stages_on(models / name, "small", "large")) as model:

        def call() -> Any:
            return model.run(references(models / name)[0]) if name == "bert" else model.generate([5, 6, 7], seed=1)

        expected = call()
        os.kill(cluster.nodes["large"].pid, signal.SIGSTOP)
        try:
            with (
                pytest.raises(pipeload.DeadlineError, match="while a pass ran on small, large"),
                pipeload.deadline(0.5),
            ):
                call()
        finally:
            os.kill(cluster.nodes["large"].pid, signal.SIGCONT)
        wait_until(connection, lambda stages: len(stages) == 2 and not any(stage["waiting"] for stage in stages))
        if name == "bert":
            assert_close(call(), expected, 1e-5)
        else:
            assert call().token_ids == expected.token_ids
        assert model.replacements == 0


def test_closing_ends_a_call_that_waits(connection: Connection, models: Path) -> None:
    gate = Gate()
    inputs = references(models / "bert")[0]

    def endless() -> Iterator[dict[str, Any]]:
        yield inputs
        gate.stop_here()
        yield inputs

    model = connection.load("bert")
    call = Background(lambda: list(model.run_many(endless())))
    gate.wait_reached()
    model.close()
    gate.open()
    assert isinstance(call.wait(), pipeload.ClosedError)
    with pytest.raises(pipeload.ClosedError):
        model.run(inputs)
    again = connection.load("bert")
    assert_close(again.run(inputs), again.run(inputs), 1e-5)
    connection.close()
    with pytest.raises(pipeload.ClosedError):
        again.run(inputs)
