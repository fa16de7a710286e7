"""Rotary frequencies that depend on the length of a text: steps answer as the source does, or say why they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.exporter.check.test_parity import CHECKPOINTS, write_checkpoint
from tests.marks import slow
from tests.models import traced_here

import pipeload
from pipeload.errors import ConfigError
from pipeload.format.manifest import RopeChange
from pipeload_export import export
from pipeload_export.source.ropes import change_of

_IDS = np.random.default_rng(1).integers(1, 200, (1, 300))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[pipeload.Model, Any]]]:
    """Name of a checkpoint -> the streamed model, and transformers' own."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("ropes")
    models: dict[str, tuple[pipeload.Model, Any]] = {}

    def get(name: str) -> tuple[pipeload.Model, Any]:
        if name not in models:
            source = write_checkpoint(root / name, name)
            with traced_here():
                export(source, root / "exported" / name, verify=False)
            reference = getattr(transformers, CHECKPOINTS[name][0]).from_pretrained(source, attn_implementation="eager")
            models[name] = pipeload.load(root / "exported" / name), reference.eval()
        return models[name]

    yield get
    for model, _ in models.values():
        model.close()


def step(model: pipeload.Model, state: pipeload.DecodeState, begin: int, end: int) -> NDArray[Any]:
    offered = {
        "input_ids": _IDS[:, begin:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(begin, end)[None],
    }
    return model.step({spec.name: offered[spec.name] for spec in model.inputs}, state)[0, -1]


def answers(reference: Any, ends: list[int]) -> Iterator[NDArray[Any]]:
    """The source's last logits of a text that grows: it keeps its caches from one end to the next."""
    import torch

    caches, begin = None, 0
    for end in ends:
        with torch.no_grad():
            found = reference(torch.from_numpy(_IDS[:, begin:end]), past_key_values=caches, use_cache=True)
        caches, begin = found.past_key_values, end
        yield found.logits[0, -1].numpy()


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("name", ["llama-dynamic", slow("phi3-longrope")])
def test_a_long_text_in_one_step_has_the_frequencies_of_its_length(
    opened: Callable[[str], tuple[pipeload.Model, Any]], name: str
) -> None:
    """A longer text usually passes in pieces of 256 tokens: the first would have the frequencies of its own length."""
    model, reference = opened(name)
    with model.new_state() as state:
        assert_close(step(model, state, 0, 300), next(answers(reference, [300])))


@pytest.mark.slow
def test_a_dynamic_rope_goes_on_with_its_caches(opened: Callable[[str], tuple[pipeload.Model, Any]]) -> None:
    model, reference = opened("llama-dynamic")
    ends = [18, 19, 20, 21, 22, 23, 290]
    with model.new_state() as state:
        for begin, end, expected in zip([0, *ends], ends, answers(reference, ends), strict=False):
            assert_close(step(model, state, begin, end), expected)


def test_a_longrope_begins_anew(opened: Callable[[str], tuple[pipeload.Model, Any]]) -> None:
    """transformers' own `generate` computes the text anew there."""
    model, reference = opened("phi3-longrope")
    with model.new_state() as state:
        step(model, state, 0, 15)
        step(model, state, 15, 16)
        with pytest.raises(ConfigError, match=r"Up to 16 .* holds 16 tokens .* become 17 .* first step of a new state"):
            step(model, state, 16, 17)
        state.truncate(10)
        step(model, state, 10, 16)
    with model.new_state() as state:
        step(model, state, 0, 20)
        state.truncate(10)
        with pytest.raises(ConfigError, match=r"holds 10 tokens .* become 12 of the other"):
            step(model, state, 10, 12)
        assert_close(step(model, state, 10, 18), next(answers(reference, [18])))
    ends = [17, 18, 19]
    with model.new_state() as state:
        for begin, end in zip([0, *ends], ends, strict=False):
            assert_close(step(model, state, begin, end), next(answers(reference, [end])))


LONGROPE: dict[str, object] = {"rope_type": "longrope"}


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({}, None),
        ({"rope_scaling": None, "max_position_embeddings": 8}, None),
        ({"rope_scaling": {"rope_type": "linear"}, "max_position_embeddings": 8}, None),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 8}, RopeChange(tokens=8, keeps_caches=True)),
        (
            {"rope_scaling": LONGROPE, "max_position_embeddings": 8, "original_max_position_embeddings": 4},
            RopeChange(tokens=4, keeps_caches=False),
        ),
        (
            {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 4}, "max_position_embeddings": 8},
            RopeChange(tokens=8, keeps_caches=False),  # as transformers itself reads it
        ),
        (
            {
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4},
                "max_position_embeddings": 8,
            },
            RopeChange(tokens=4, keeps_caches=False),  # transformers 5 reads it
        ),
        ({"rope_parameters": {"rope_type": "default"}, "max_position_embeddings": 8}, None),
        ({"rope_scaling": LONGROPE}, None),
    ],
)
def test_the_config_says_where_frequencies_change(config: dict[str, object], change: RopeChange | None) -> None:
    assert change_of(config) == change
