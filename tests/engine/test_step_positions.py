"""`step` with several positions, and states that forget: the logits are those of single steps from the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.harness import assert_close, decoder_inputs
from tests.engine.tasks.generate.drafting import load
from tests.marks import slow

import pipeload

_TOKENS = np.random.default_rng(5).integers(0, 90, (2, 24))


def _step(model: pipeload.Model, ids: NDArray[np.int64], state: Any, **options: Any) -> NDArray[Any]:
    """The logits of the new tokens that were asked for, `[batch, positions, vocabulary]`."""
    logits = model.step(decoder_inputs(model, ids, state.length), state, **options)
    return logits.reshape(len(ids), -1, logits.shape[-1])


def _single_steps(model: pipeload.Model, ids: NDArray[np.int64]) -> NDArray[Any]:
    with model.new_state() as state:
        return np.concatenate([_step(model, ids[:, k : k + 1], state) for k in range(ids.shape[1])], axis=1)


def _assert_close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert_close({"logits": actual}, {"logits": expected}, 1e-5)


@pytest.mark.parametrize("room_bytes", [600_000, slow(6_000_000)])
@pytest.mark.parametrize("decoder", ["gpt2", slow("llama"), "toy-decoder"], indirect=True)
def test_several_positions_are_what_single_steps_give(decoder: Path, room_bytes: int) -> None:
    with load(decoder, room_bytes) as model:
        for batch in (1, 2):
            ids = _TOKENS[:batch]
            expected = _single_steps(model, ids)
            with model.new_state() as state:
                begin = 0
                for length, positions in [(7, 7), (5, 3), (1, 1), (4, 4), (7, 2)]:
                    end = begin + length
                    logits = model.step(
                        decoder_inputs(model, ids[:, begin:end], begin),
                        state,
                        **({"positions": positions} if positions > 1 else {}),
                    )
                    if positions > 1:
                        assert logits.shape == (batch, positions, expected.shape[-1])
                    assert logits.dtype == np.float32
                    assert state.length == end
                    _assert_close(logits.reshape(batch, positions, -1), expected[:, end - positions : end])
                    begin = end


def test_positions_may_lie_in_several_pieces_of_a_long_text(exported_llama: Path) -> None:
    ids = np.random.default_rng(6).integers(0, 90, (1, 700))
    with load(exported_llama, 60_000_000) as model:
        with model.new_state() as state:
            # Two pieces with room for one's positions each.
            expected = np.concatenate(
                [_step(model, ids[:, k : k + 25], state, positions=25) for k in range(0, 700, 25)], axis=1
            )
        for positions in (1, 2, 188, 189, 300, 444, 445, 700):
            with model.new_state() as state:
                _assert_close(_step(model, ids, state, positions=positions), expected[:, -positions:])
                assert state.length == 700
        two = np.concatenate([ids, ids[:, ::-1]])
        with model.new_state() as state:
            _step(model, two[:, :10], state)
            logits = _step(model, two[:, 10:], state, positions=333)
        _assert_close(logits[:1], expected[:, -333:])


@pytest.mark.parametrize("wrong", [0, -1, 6, 1000, 2.0])
def test_positions_that_are_not_there_are_refused(one_of_each: Path, wrong: Any) -> None:
    ids = _TOKENS[:1]
    with load(one_of_each) as model, model.new_state() as state:
        expected = _single_steps(model, ids)
        _step(model, ids[:, :9], state)
        with pytest.raises(pipeload.ConfigError, match="positions"):
            model.step(decoder_inputs(model, ids[:, 9:14], 9), state, positions=wrong)
        assert state.length == 9
        _assert_close(_step(model, ids[:, 9:14], state, positions=5), expected[:, 9:14])


def test_what_was_truncated_was_never_there(decoder: Path) -> None:
    with load(decoder) as model:
        for batch in (1, 2):
            ids, other = _TOKENS[:batch], (_TOKENS[:batch] + 13) % 90
            expected = _single_steps(model, ids)
            with model.new_state() as state:
                _step(model, ids[:, :9], state)
                _step(model, other[:, :6], state)
                state.truncate(9)
                assert state.length == 9
                _assert_close(_step(model, ids[:, 9:10], state), expected[:, 9:10])
                _step(model, other[:, :3], state)
                state.truncate(4)
                assert state.length == 4
                _assert_close(_step(model, ids[:, 4:12], state, positions=8), expected[:, 4:12])
                # As long as it is.
                state.truncate(12)
                _assert_close(_step(model, ids[:, 12:13], state), expected[:, 12:13])
                state.truncate(0)
                assert state.length == 0
                _assert_close(_step(model, ids[:, :5], state, positions=5), expected[:, :5])
                state.truncate(3)
                state.truncate(2)
                for place in range(2, 8):
                    _assert_close(_step(model, ids[:, place : place + 1], state), expected[:, place : place + 1])


def test_a_cache_that_was_truncated_may_grow(exported_llama: Path) -> None:
    """Beyond the room that it has, in pieces as well."""
    ids = np.random.default_rng(6).integers(0, 90, (1, 600))
    with load(exported_llama, 60_000_000) as model:
        with model.new_state() as state:
            expected = _step(model, ids, state, positions=600)
        with model.new_state() as state:
            _step(model, ids[:, :120], state)
            _step(model, ids[:, :200], state)
            state.truncate(120)
            _assert_close(_step(model, ids[:, 120:], state, positions=4), expected[:, -4:])
            state.truncate(300)
            _assert_close(_step(model, ids[:, 300:], state, positions=300), expected[:, 300:])


@pytest.mark.parametrize("wrong", [-1, 6, 1000, 2.0])
def test_lengths_outside_the_text_are_refused(one_of_each: Path, wrong: Any) -> None:
    ids = _TOKENS[:1]
    with load(one_of_each) as model, model.new_state() as state:
        with pytest.raises(pipeload.ConfigError):
            state.truncate(1)
        state.truncate(0)
        expected = _single_steps(model, ids[:, :7])
        _step(model, ids[:, :5], state)
        with pytest.raises(pipeload.ConfigError):
            state.truncate(wrong)
        assert state.length == 5
        _assert_close(_step(model, ids[:, 5:7], state, positions=2), expected[:, 5:7])


def test_a_step_that_fails_after_truncation_leaves_the_state_usable(decoder: Path) -> None:
    ids = _TOKENS[:1]
    with load(decoder) as model, model.new_state() as state:
        expected = _single_steps(model, ids)
        _step(model, ids[:, :9], state)
        state.truncate(5)
        with pytest.raises(pipeload.PipeloadError):
            _step(model, ids[:, 5:9] + 10**6, state, positions=2)
        assert state.length == 5
        _assert_close(_step(model, ids[:, 5:9], state, positions=2), expected[:, 7:9])
