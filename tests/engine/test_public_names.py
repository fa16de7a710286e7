"""Users see the public names where they import them from, and classes of figures only can be pickled and kept."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from tests.engine.tasks.fakes import ToyDecoder

import pipeload
from pipeload.measuring import profile_store
from pipeload.tasks.generate.generate import generate

NAMES = sorted(pipeload._HOMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_says_that_it_is_public(name: str) -> None:
    assert f"{getattr(pipeload, name).__module__}.{getattr(pipeload, name).__qualname__}" == f"pipeload.{name}"


def test_a_generation_can_be_pickled(tmp_path: Path) -> None:
    made = generate(ToyDecoder(tmp_path), [1, 2], max_new_tokens=3)
    for same in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert same == made
        assert type(same) is pipeload.Generation


def test_a_profile_can_be_pickled_and_kept(toy: Path, tmp_path: Path) -> None:
    with pipeload.load(toy) as model:
        profile, plan = model.profile, model.plan
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert pickle.loads(pickle.dumps(plan)) == plan
    profile_store.write(profile, tmp_path / "profile.json")
    assert type(profile_store.read(tmp_path / "profile.json")) is pipeload.Profile
