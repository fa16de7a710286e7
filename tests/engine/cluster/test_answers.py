"""Nodes together answer what one machine answers, token for token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cluster.processes import Cluster, line
from tests.engine.harness import PATIENCE_S, Background, assert_close, decoder_inputs
from tests.models import REFERENCE_NAME

import pipeload
from pipeload.cluster.connection import Connection
from pipeload.cluster.route import stage_places
from pipeload.format import manifest as manifests

NODES = ("small", "large", "middle")


def stages_on(directory: Path, *nodes: str) -> dict[str, str]:
    """A model spread over nodes."""
    manifest = manifests.read(directory)
    names = [shard.name for shard in manifest.shards]
    cuts = stage_places(manifest)
    chosen = [cuts[len(cuts) * number // len(nodes)] for number in range(1, len(nodes))]
    places = [0, *chosen, len(names)]
    return {
        node: f"{names[begin]}:{names[end - 1]}"
        for node, begin, end in zip(nodes, places[:-1], places[1:], strict=True)
    }


def references(directory: Path) -> list[dict[str, Any]]:
    with np.load(directory / REFERENCE_NAME) as saved:
        numbers = sorted({name.split(".")[1] for name in saved.files})
        return [
            {name.split(".", 2)[2]: saved[name] for name in saved.files if name.startswith(f"input.{number}.")}
            for number in numbers
        ]


@pytest.mark.parametrize(
    ("name", "count"),
    [("bert", 1), ("bert", 2), ("bert", 3), ("vit", 2), ("vit", 3), ("gpt2", 3), ("llama", 2)],
)
def test_a_pass_is_that_of_one_machine(connection: Connection, models: Path, name: str, count: int) -> None:
    inputs = references(models / name)
    with pipeload.load(models / name) as alone:
        expected = [alone.run(each) for each in inputs]
    with connection.load(name, stages=stages_on(models / name, *NODES[:count])) as model:
        assert [segment.node for segment in model.placement.segments] == [*NODES[:count]]
        found = [model.run(each) for each in inputs]
        together = list(model.run_many(inputs))
    for made in (found, together):
        for one, other in zip(made, expected, strict=True):
            assert one.keys() == other.keys()
            assert_close(one, other, 1e-5)


@pytest.mark.parametrize(("name", "count"), [("gpt2", 2), ("gpt2", 3), ("llama", 3)])
def test_texts_are_those_of_one_machine(connection: Connection, models: Path, name: str, count: int) -> None:
    prompts: list[list[int]] = [[5, 6, 7], [*range(20, 31)]]
    options: dict[str, Any] = {"max_new_tokens": 12}
    with pipeload.load(models / name) as alone:
        expected = alone.generate(prompts, **options)
    with connection.load(name, stages=stages_on(models / name, *NODES[:count])) as model:
        found = model.generate(prompts, **options)
        looked_up = model.generate([5, 6, 5, 6, 5, 6, 7], prompt_lookup_num_tokens=3, **options)
        plain = model.generate([5, 6, 5, 6, 5, 6, 7], **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert looked_up.token_ids == plain.token_ids


def test_a_long_text_passes_in_pieces(connection: Connection, models: Path) -> None:
    """Stages work on different pieces at the same time, and the caches are those of one piece."""
    ids = np.random.default_rng(0).integers(0, 1000, (1, 600))
    with pipeload.load(models / "llama") as alone, alone.new_state() as state:
        inputs = decoder_inputs(alone, ids)
        expected = [alone.step(inputs, state, positions=3), alone.step(next_of(alone, ids), state)]
    with connection.load("llama", stages=stages_on(models / "llama", *NODES)) as model, model.new_state() as own:
        found = [model.step(inputs, own, positions=3), model.step(next_of(model, ids), own)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_state_that_is_cut_goes_on_from_there(connection: Connection, models: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 1000, (1, 20))
    with connection.load("llama", stages=stages_on(models / "llama", *NODES)) as model:
        with model.new_state() as state, model.new_state() as other:
            model.step(decoder_inputs(model, ids), state)
            state.truncate(9)
            again = model.step(decoder_inputs(model, ids[:, 9:15], past=9), state)
            np.testing.assert_allclose(
                again, model.step(decoder_inputs(model, ids[:, :15]), other), rtol=1e-4, atol=1e-5
            )


def test_a_node_without_the_model_fetches_its_shards(
    cluster: Cluster, connection: Connection, models: Path, tmp_path: Path
) -> None:
    inputs = references(models / "llama")
    with pipeload.load(models / "llama") as alone:
        expected = [alone.run(each) for each in inputs]
    cluster.start({"empty": "400MB"}, "--fetch", "10MB", models=tmp_path)
    try:
        with connection.load("llama", stages=stages_on(models / "llama", "small", "empty")) as model:
            for one, other in zip([model.run(each) for each in inputs], expected, strict=True):
                assert_close(one, other, 1e-5)
    finally:
        cluster.kill("empty")
    (fetched,) = (tmp_path / ".fetched").iterdir()
    names = {path.name for path in (models / "llama" / "shards").iterdir()}
    found = {path.name for path in (fetched / "shards").iterdir()}
    # Its own, and the first ones, by which it was measured.
    assert found <= names
    assert {path.name for path in (models / "llama" / "shards").glob("block.002.*")} <= found


def test_links_are_measured_before_a_model_is_placed(connection: Connection) -> None:
    connection.plan("bert")
    assert len(connection._nodes.known_links) == len(NODES) * (len(NODES) - 1) / 2
    assert all(link.latency_s > 0 and link.bytes_per_s > 0 for link in connection._nodes.known_links.values())


def test_callers_share_the_stages(connection: Connection, models: Path) -> None:
    prompts = [[number, number + 1, number + 2] for number in range(6)]
    with pipeload.load(models / "gpt2") as alone:
        expected = [alone.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    with connection.load("gpt2", stages=stages_on(models / "gpt2", *NODES)) as model:
        callers = [Background(lambda ids=ids: model.generate(ids, max_new_tokens=8).token_ids) for ids in prompts]
        assert [caller.end() for caller in callers] == expected


def test_what_is_asked_wrongly_is_refused_as_on_one_machine(connection: Connection, models: Path) -> None:
    with connection.load("bert") as model:
        with pytest.raises(pipeload.ConfigError, match="is missing"):
            model.run({})
        with pytest.raises(pipeload.ConfigError, match="no KV cache"):
            model.new_state()
    with pytest.raises(pipeload.ClosedError):
        model.run(references(models / "bert")[0])
    with pytest.raises(pipeload.ClusterError, match="no-such-model"):
        connection.load("no-such-model")
    with pytest.raises(pipeload.ConfigError, match="does not follow"):
        connection.load("bert", stages={"small": "block.001:"})


def test_stages_end_with_the_model(connection: Connection, models: Path) -> None:
    with connection.load("bert", stages=stages_on(models / "bert", *NODES)):
        wait_until(connection, lambda stages: len(stages) == 3)
    wait_until(connection, lambda stages: not stages)


def test_stages_end_with_a_client_that_is_killed(connection: Connection, cluster: Cluster, models: Path) -> None:
    program = (
        f"import pipeload; model = pipeload.connect({cluster.address!r})"
        f".load('bert', stages={stages_on(models / 'bert', *NODES)!r}); print('open', flush=True); input()"
    )
    client = cluster.begun_program(program)
    try:
        assert line(client) == "open"
        wait_until(connection, lambda stages: len(stages) == 3)
    finally:
        client.kill()
        client.communicate()
    wait_until(connection, lambda stages: not stages)


def wait_until(connection: Connection, holds: Callable[[list[Any]], bool]) -> None:
    """Wait until it holds for the stages that are open on all nodes, as the scheduler hears of them."""
    watch = connection._watch
    at_a_look(connection, lambda: holds([stage for stages in watch.facts.values() for stage in stages]))


def at_a_look(connection: Connection, holds: Callable[[], bool]) -> None:
    """Wait until it holds when the client has looked at the nodes, twice a second."""
    reached = threading.Event()
    watch = connection._watch

    def look(_: object) -> None:
        if holds():
            reached.set()

    watch.listeners.add(look)
    try:
        assert reached.wait(PATIENCE_S), watch.facts
    finally:
        watch.listeners.discard(look)


def next_of(model: Any, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
    return decoder_inputs(model, ids[:, :1], past=ids.shape[1])
