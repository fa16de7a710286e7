"""A stage gives the part of a model's answer that its shards make: stages, one after another, are the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_close
from tests.engine.model.loading import load
from tests.models import REFERENCE_NAME

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.faults import faults
from pipeload.format.stages import cut_places, stage


def _ranges(directory: Path, cuts: Sequence[int]) -> list[str]:
    """The stages between these places, as a caller names them."""
    shards = manifests.read(directory).shards
    places = [0, *cuts, len(shards)]
    return [f"{shards[begin].name}:{shards[end - 1].name}" for begin, end in pairwise(places)]


def _open(stack: ExitStack, directory: Path, cuts: Sequence[int]) -> list[pipeload.Model]:
    return [stack.enter_context(load(directory, shards=one)) for one in _ranges(directory, cuts)]


def _chained(stages: Sequence[pipeload.Model], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of all stages; each takes of the graph's inputs and the edges before it what it needs."""
    known, outputs = dict(inputs), {}
    for one in stages:
        caches = one.manifest.cache_inputs
        taken = {spec.name: known[spec.name] for spec in one.manifest.inputs if spec.name in known}
        assert {spec.name for spec in one.inputs} - caches <= taken.keys()
        made = one.run(taken)
        known |= made
        outputs |= made
    return outputs


def _references(directory: Path) -> list[dict[str, Any]]:
    with np.load(directory / REFERENCE_NAME) as saved:
        numbers = sorted({name.split(".")[1] for name in saved.files})
        return [
            {name.split(".", 2)[2]: saved[name] for name in saved.files if name.startswith(f"input.{number}.")}
            for number in numbers
        ]


def test_two_stages_are_the_model_wherever_it_is_cut(exported: Path) -> None:
    with load(exported) as model:
        expected = [(inputs, model.run(inputs)) for inputs in _references(exported)]
    for place in cut_places(manifests.read(exported)):
        with ExitStack() as stack:
            stages = _open(stack, exported, [place])
            for inputs, outputs in expected:
                made = _chained(stages, inputs)
                assert_close({name: made[name] for name in outputs}, outputs, 1e-5)


def test_a_stage_for_each_shard_is_the_model(any_toy: Path) -> None:
    with load(any_toy) as model:
        expected = model.run(toys.inputs())
    with ExitStack() as stack:
        made = _chained(_open(stack, any_toy, cut_places(manifests.read(any_toy))), toys.inputs())
    assert_close({name: made[name] for name in expected}, expected, 1e-5)


def test_every_stage_has_a_consistent_manifest(exported: Path) -> None:
    manifest = manifests.read(exported)
    places = [0, *cut_places(manifest), len(manifest.shards)]
    for begin in places:
        for end in places:
            if begin < end:
                assert list(faults(stage(manifest, begin, end))) == []


def _given(one: pipeload.Model, known: Mapping[str, Any]) -> dict[str, Any]:
    return {spec.name: known[spec.name] for spec in one.inputs}


@pytest.mark.parametrize("lengths", [(5, 1, 1, 3), (300, 1, 2)])
def test_steps_of_stages_give_the_logits_of_the_model(toy_decoder: Path, lengths: tuple[int, ...]) -> None:
    """Also of a text that passes through the shards in pieces."""
    tokens = toys.inputs(2, sum(lengths))["input_ids"]
    manifest = manifests.read(toy_decoder)
    with ExitStack() as stack:
        model = stack.enter_context(load(toy_decoder))
        stages = _open(stack, toy_decoder, [cut_places(manifest)[1], cut_places(manifest)[-1]])
        state = stack.enter_context(model.new_state())
        states = [stack.enter_context(one.new_state()) if one.manifest.caches else None for one in stages]
        past = 0
        for length in lengths:
            ids = tokens[:, past : past + length]
            offered = {"input_ids": ids, "attention_mask": np.ones((2, past + length), np.int64)}
            expected = model.step(_given(model, offered), state)
            known: dict[str, Any] = dict(offered)
            for one, own in zip(stages, states, strict=True):
                given = _given(one, known)
                known |= one.step_outputs(given, own, positions=1) if own else one.run(given)
            np.testing.assert_allclose(known["logits"][:, -1:], expected, rtol=1e-5, atol=1e-5)
            past += length


def test_a_stage_plans_for_its_own_shards(toy: Path) -> None:
    with load(toy, shards="block.001:block.002") as stage_:
        assert {shard.name for shard in stage_.manifest.shards} == {"block.001", "block.002"}
        assert stage_.plan.resident <= {"block.001", "block.002"}
        assert stage_.manifest.weight_bytes < manifests.read(toy).weight_bytes / 2


@pytest.mark.parametrize(
    ("shards", "fact"),
    [
        ("block.001", "must be FIRST:LAST"),
        ("block.001:nothing", "no shard 'nothing'"),
        ("block.002:block.001", "comes after"),
        (":head.000", "slices of a head stay together"),
        (7, "shards is 7"),
    ],
)
def test_a_range_that_is_no_stage_is_refused(toy_decoder: Path, shards: Any, fact: str) -> None:
    with pytest.raises(pipeload.ConfigError, match=fact):
        pipeload.load(toy_decoder, shards=shards)


def test_either_end_may_be_left_out(toy: Path) -> None:
    names = [shard.name for shard in manifests.read(toy).shards]
    with load(toy, shards=":block.001") as first, load(toy, shards="block.002:") as rest:
        assert [shard.name for one in (first, rest) for shard in one.manifest.shards] == names


def test_a_stage_refuses_what_only_a_model_does(toy_decoder: Path) -> None:
    with load(toy_decoder, shards=":block.001") as one, one.new_state() as state:
        with pytest.raises(pipeload.ConfigError, match="step_outputs"):
            one.step(toys.inputs(), state)
        with pytest.raises(pipeload.ConfigError, match="a stage of"):
            one.generate("text")


def test_a_stage_teaches_no_profile_of_the_model(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Path] = []
    monkeypatch.setattr("pipeload.measuring.profile_store.keep", lambda directory, _: kept.append(directory))
    with load(toy, shards=":block.001") as one:
        for _ in range(3):
            one.run({spec.name: toys.inputs()[spec.name] for spec in one.inputs})
    assert kept == []
