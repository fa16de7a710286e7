"""Where a model moves, the caches of its texts are copied from node to node, or computed again: the faster of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cluster.test_adapting import move
from tests.engine.cluster.test_answers import next_of, stages_on
from tests.engine.harness import decoder_inputs

import pipeload
from pipeload.cluster import ring as rings
from pipeload.cluster.connection import Connection
from pipeload.cluster.messages import Job, Text
from pipeload.cluster.ring import Ring
from pipeload.errors import BudgetError


class _Told:
    """What the rings were asked for.

    Attributes:
        taken: whether the caches of a text were copied, for each text that was to be.
        pieces: tokens of each step that a ring took, its number of pieces, and the tokens before it.
    """

    def __init__(self) -> None:
        self.taken: dict[str, bool] = {}
        self.pieces: list[int] = []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> _Told:
    found, take, step = _Told(), Ring.take, Ring.step

    async def taking(ring: Ring, text: Text) -> bool:
        found.taken[text.state] = await take(ring, text)
        return found.taken[text.state]

    async def stepping(ring: Ring, pieces: list[tuple[dict[str, Any], Job]]) -> Any:
        found.pieces.append(sum(arrays["input_ids"].shape[1] for arrays, _ in pieces))
        return await step(ring, pieces)

    monkeypatch.setattr(Ring, "take", taking)
    monkeypatch.setattr(Ring, "step", stepping)
    return found


@pytest.fixture(params=[0.0, 1e9], ids=["copied", "computed"])
def copying_s(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    seconds: float = request.param
    monkeypatch.setattr(rings, "copying_s", lambda *_, **__: seconds)
    return seconds


@pytest.mark.parametrize("nodes", [("large",), ("middle", "small"), ("large", "small", "middle")])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_text_goes_on_after_a_move(
    connection: Connection, models: Path, told: _Told, copying_s: float, name: str, nodes: tuple[str, ...]
) -> None:
    """To other nodes, and to nodes that have had another part of it."""
    prompts, options = [[5, 6, 7, 8], [*range(40, 51)]], {"max_new_tokens": 10}
    with pipeload.load(models / name) as alone:
        expected = [one.token_ids for one in alone.generate(prompts, **options)]  # type: ignore[arg-type]
    seen: list[int] = []
    with connection.load(name, stages=stages_on(models / name, "small", "large")) as model:

        def on_token(token: pipeload.NewToken) -> None:
            seen.append(token.token_id)
            if len(seen) == 8:
                move(connection, model, name, stages_on(models / name, *nodes))

        made = model.generate(prompts, on_token=on_token, **options)  # type: ignore[arg-type]
        assert [one.token_ids for one in made] == expected
    copied = copying_s == 0
    assert [*told.taken.values()] == [True] * copied
    # A step after the first one takes one token of each, but for the one that computes the caches again.
    assert [tokens for tokens in told.pieces[1:] if tokens > 1] == [] if copied else [told.pieces[0] + 4]


def test_texts_that_have_no_step_meanwhile_are_copied_too(
    connection: Connection, models: Path, told: _Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one, one that is cut, and one that is closed; then twice, and back to the nodes where they began."""
    monkeypatch.setattr(rings, "copying_s", lambda *_, **__: 0.0)
    ids = np.random.default_rng(0).integers(0, 1000, (1, 600))
    first, second = (stages_on(models / "llama", *nodes) for nodes in (("small", "large"), ("large", "middle")))
    with pipeload.load(models / "llama") as alone, connection.load("llama", stages=first) as model:
        with alone.new_state() as whole, model.new_state() as state, model.new_state() as cut:
            closed = model.new_state()
            for one in (state, cut, closed):
                model.step(decoder_inputs(model, ids), one)
            cut.truncate(300)
            closed.close()
            move(connection, model, "llama", second)
            assert [*told.taken.values()] == [True, True]
            move(connection, model, "llama", first)
            begun = len(told.pieces)
            alone.step(decoder_inputs(alone, ids), whole)
            expected = alone.step(next_of(alone, ids), whole)
            np.testing.assert_allclose(model.step(next_of(model, ids), state), expected, rtol=1e-4, atol=1e-4)
            whole.truncate(300)
            expected = alone.step(decoder_inputs(alone, ids[:, 300:310], past=300), whole)
            found = model.step(decoder_inputs(model, ids[:, 300:310], past=300), cut)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            assert told.pieces[begun:] == [1, 10]


def test_caches_that_cannot_be_copied_are_computed_again(
    connection: Connection, models: Path, told: _Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rings, "copying_s", lambda *_, **__: 0.0)
    call = Ring._call

    async def failing(ring: Ring, place: Any, method: str, *arguments: Any) -> Any:
        if method == "take" and place.node == "large":
            raise BudgetError("There is no room.", needed_bytes=2, budget_bytes=1)
        return await call(ring, place, method, *arguments)

    monkeypatch.setattr(Ring, "_call", failing)
    ids = np.random.default_rng(0).integers(0, 1000, (1, 20))
    first, second = (stages_on(models / "llama", *nodes) for nodes in (("small", "middle"), ("large", "middle")))
    with pipeload.load(models / "llama") as alone, connection.load("llama", stages=first) as model:
        with alone.new_state() as whole, model.new_state() as state:
            for one, own in ((alone, whole), (model, state)):
                one.step(decoder_inputs(one, ids), own)  # type: ignore[arg-type]
            move(connection, model, "llama", second)
            assert [*told.taken.values()] == [False]
            expected = alone.step(next_of(alone, ids), whole)
            np.testing.assert_allclose(model.step(next_of(model, ids), state), expected, rtol=1e-4, atol=1e-4)
            assert told.pieces == [20, 21]
