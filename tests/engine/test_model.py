"""The facade: right answers under every budget, for every caller, until it is closed, and nothing left after that."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import shutil
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    EMULATED,
    PATIENCE_S,
    Background,
    Gate,
    agents,
    assert_close,
    assert_same,
    run_python,
    run_sequentially,
    smallest_budget,
)
from tests.engine.tasks.fakes import write_bert_tokenizer
from tests.models import REFERENCE_NAME

import pipeload
from pipeload import model as models
from pipeload.format import manifest as manifests
from pipeload.machine.memory import rss_bytes
from pipeload.measuring import profile_store
from pipeload.pipeline.session import ShardSession, to_array
from pipeload.planning import needs, planner
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.replanner import Replanner
from pipeload.storage import buffers
from pipeload.storage import stamps as stamping
from pipeload.storage.weights import Storage
from pipeload.tasks.text.tokenizer import tokenizer_of
from pipeload.tracing.trace import Progress

THREADS = 2
PLENTY = "8GB"
no_subprocess = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")


def _load(directory: Path, budget: int | str = PLENTY, **options: Any) -> pipeload.Model:
    return pipeload.load(directory, budget, **{"threads": THREADS, **options})


def _budgets(directory: Path, profile: Profile) -> dict[str, int]:
    """A budget for each kind of plan, from the smallest that works to one in which everything fits."""
    manifest = manifests.read(directory)
    dims = needs.planning_dims(manifest) | {d: 32 for d in ("height", "width") if d in manifest.dims}
    # Of a whole pass: caches are then outputs, and take more than a step's.
    need = needs.pass_bytes(manifest, dims)

    def plan(budget: int) -> Plan:
        return planner.make_plan(manifest, profile, budget_bytes=budget, pass_bytes=need, threads=THREADS)

    with pytest.raises(pipeload.BudgetError) as caught:
        plan(1)
    found: dict[str, int] = {}
    for budget in range(caught.value.needed_bytes - 2_000_000, caught.value.needed_bytes + 100_000_000, 100_000):
        try:
            made = plan(budget)
        except pipeload.BudgetError:
            continue
        kind = f"{made.buffers} buffers, {'some' if made.resident else 'none'} resident"
        kind += ", some in part" * bool(made.partly_resident)
        if not made.streamed_bytes:
            kind = "packed" if made.packed else "all resident"
        found.setdefault(kind, budget)
        if made.packed:
            break
    return found


@pytest.fixture
def fixed_profile(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """The process measured once, so that plans do not depend on what other tests left in memory."""
    profile = Profile(process_bytes=rss_bytes(), cores=2)
    monkeypatch.setattr(models.profiler, "measure", lambda: profile)
    return profile


@pytest.fixture
def unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that only depend on budgets and inputs, not on how fast the machine is today."""
    monkeypatch.setattr(Replanner, "after_pass", lambda *_: False)


def _reference(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs, and the unsplit model's outputs for them."""
    with np.load(directory / REFERENCE_NAME) as saved:
        for number in sorted({name.split(".")[1] for name in saved.files}):
            inputs, outputs = (
                {name.split(".", 2)[2]: saved[name] for name in saved.files if name.startswith(f"{kind}.{number}.")}
                for kind in ("input", "output")
            )
            yield inputs, outputs


# Right answers


@pytest.mark.usefixtures("unlearning")
def test_exported_models_agree_with_the_sequential_and_the_unsplit_model(
    exported: Path, fixed_profile: Profile
) -> None:
    """Streamed: bit for bit the sequential one. Packed: within 1e-5. Any: within 1e-4 of the unsplit model."""
    kinds = _budgets(exported, fixed_profile)
    assert {"packed", "all resident"} < kinds.keys()
    cases = [(inputs, run_sequentially(exported, inputs, threads=THREADS), out) for inputs, out in _reference(exported)]
    for kind, budget in kinds.items():
        with _load(exported, budget) as model:
            for inputs, sequential, unsplit in cases:
                for _ in range(2):
                    outputs = model.run(inputs)
                    if kind == "packed" or model.plan.packed:
                        assert_close(outputs, sequential, 1e-5)
                    else:
                        assert_same(outputs, sequential)
                    assert_close(outputs, unsplit, 1e-4)


@pytest.mark.usefixtures("unlearning")
def test_toys_agree_with_the_sequential_model_under_every_budget(any_toy: Path, fixed_profile: Profile) -> None:
    expected = run_sequentially(any_toy, toys.inputs(), threads=THREADS)
    kinds = _budgets(any_toy, fixed_profile)
    assert len(kinds) >= 4
    for kind, budget in kinds.items():
        with _load(any_toy, budget) as model:
            for _ in range(3):
                if kind == "packed":
                    assert_close(model.run(toys.inputs()), expected, 1e-5)
                else:
                    assert_same(model.run(toys.inputs()), expected)


def _check_until_packed(model: pipeload.Model, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Bit for bit as long as nothing was ever packed, and close from then on."""
    outputs = model.run(inputs)
    if any(span.kind == "pack" for span in model.trace.spans):
        assert_close(outputs, expected, 1e-5)
    else:
        assert_same(outputs, expected)


def test_toys_agree_while_the_engine_learns_and_plans_anew(any_toy: Path) -> None:
    expected = run_sequentially(any_toy, toys.inputs(), threads=THREADS)
    least = smallest_budget(any_toy)
    for budget in (least, least + 3_000_000, least + 12_000_000, least + 60_000_000):
        with _load(any_toy, budget) as model:
            for _ in range(12):
                _check_until_packed(model, toys.inputs(), expected)
            assert model.profile.measured


@pytest.mark.parametrize("packed", [False, True])
def test_batch_and_length_change_from_call_to_call(toy: Path, packed: bool) -> None:
    with _load(toy, PLENTY if packed else smallest_budget(toy)) as model:
        for batch, length in [(1, 1), (3, 17), (1, 200), (8, 2), (1, 1)]:
            inputs = toys.inputs(batch, length, seed=length)
            expected = run_sequentially(toy, inputs, threads=THREADS)
            assert_close(model.run(inputs), expected, 1e-5)


@pytest.mark.parametrize("inputs", [toys.inputs(0, 5), toys.inputs(2, 0)], ids=["no rows", "no positions"])
def test_empty_inputs_give_empty_outputs(toy: Path, inputs: Any) -> None:
    with _load(toy) as model:
        assert model.run(inputs)["last_hidden_state"].shape == (*inputs["input_ids"].shape, 64)


def test_inputs_in_any_memory_layout_give_the_same_answer(toy: Path) -> None:
    inputs = toys.inputs(4, 6)
    expected = run_sequentially(toy, inputs, threads=THREADS)
    transposed = {name: np.asfortranarray(array) for name, array in inputs.items()}
    sliced = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in inputs.items()}
    fixed = {name: array.copy() for name, array in inputs.items()}
    for array in fixed.values():
        array.flags.writeable = False
    with _load(toy, smallest_budget(toy)) as model:
        for other in (transposed, sliced, fixed):
            assert_same(model.run(other), expected)
    assert all((inputs[name] == fixed[name]).all() for name in inputs), "inputs were changed"


def test_answers_outlive_later_passes_and_the_model(toy_decoder: Path) -> None:
    expected = run_sequentially(toy_decoder, toys.inputs(), threads=THREADS)
    with _load(toy_decoder, smallest_budget(toy_decoder)) as model:
        outputs = model.run(toys.inputs())
        for seed in range(5):
            model.run(toys.inputs(seed=seed))
    del model
    gc.collect()
    assert_same(outputs, expected)


# Decoders


def test_caches_that_are_left_out_are_empty(toy_decoder: Path) -> None:
    inputs = toys.inputs()
    empty = {f"past.{k}": np.zeros((2, 0, 64), np.float32) for k in range(4)}
    with _load(toy_decoder) as model:
        assert_same(model.run(inputs), model.run(inputs | empty))


def test_a_mask_for_cached_tokens_needs_the_cache(toy_decoder: Path) -> None:
    inputs = toys.inputs(1, 3) | {"attention_mask": np.ones((1, 7), np.int64)}
    with _load(toy_decoder) as model:
        # Zeros in place of the four cached tokens would be an answer, and a wrong one.
        with pytest.raises(pipeload.ConfigError, match="attention_mask"):
            model.run(inputs)
        with pytest.raises(pipeload.ConfigError, match="attention_mask"), model.new_state() as state:
            model.step(inputs, state)


def test_outputs_of_a_pass_are_the_caches_of_the_next(toy_decoder: Path) -> None:
    inputs = toys.inputs(2, 9)
    first = {"input_ids": inputs["input_ids"][:, :5], "attention_mask": inputs["attention_mask"][:, :5]}
    with _load(toy_decoder) as model:
        whole = model.run(inputs)
        made = model.run(first)
        rest = {"input_ids": inputs["input_ids"][:, 5:], "attention_mask": inputs["attention_mask"]}
        rest |= {f"past.{k}": made[f"present.{k}"] for k in range(4)}
        assert_close({"logits": model.run(rest)["logits"]}, {"logits": whole["logits"][:, 5:]}, 1e-5)


def _decoder_inputs(model: pipeload.Model, ids: Any, past: int) -> dict[str, Any]:
    batch, length = ids.shape
    offered = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
    }
    return {spec.name: offered[spec.name] for spec in model.inputs}


def _check_steps(model: pipeload.Model) -> None:
    ids = np.random.default_rng(1).integers(0, 90, (2, 12))
    with model.new_state(12) as state:
        for begin, end in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
            logits = model.step(_decoder_inputs(model, ids[:, begin:end], begin), state)[:, -1]
            assert state.length == end
            whole = model.run(_decoder_inputs(model, ids[:, :end], 0))["logits"]
            assert_close({"logits": logits}, {"logits": whole[:, -1, :]}, 1e-4)


def test_steps_give_the_logits_of_whole_passes(toy_decoder: Path) -> None:
    for budget in (PLENTY, smallest_budget(toy_decoder) + 2_000_000):
        with _load(toy_decoder, budget) as model:
            _check_steps(model)


def test_exported_decoders_step_as_they_run(exported: Path) -> None:
    with _load(exported) as model:
        if not model.manifest.caches:
            with pytest.raises(pipeload.ConfigError, match="has no KV cache"):
                model.new_state()
            return
        _check_steps(model)


@pytest.fixture
def in_place(exported: Path) -> Path:
    """An architecture whose caches are written in place."""
    caches = manifests.read(exported).caches
    if not caches:
        pytest.skip("has no caches")
    assert all(cache.in_place for cache in caches)
    return exported


def test_caches_stay_where_they_are_until_they_are_full(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_CAPACITY_STEP", 8)
    ids = np.random.default_rng(1).integers(0, 90, (2, 18))
    with _load(in_place) as model, model.new_state() as state:
        places: list[list[int]] = []
        for begin, end in [(0, 5), (5, 6), (6, 8), (8, 9), (9, 16), (16, 18)]:
            logits = model.step(_decoder_inputs(model, ids[:, begin:end], begin), state)[:, -1]
            assert (state.length, state.capacity) == (end, -(-end // 8) * 8)
            held = {name: to_array(value) for name, value in state.caches.items()}
            assert {array.shape[2] for array in held.values()} == {state.capacity}
            assert not any(array[:, :, end:].any() for array in held.values())
            places.append([array.ctypes.data for array in held.values()])
            whole = model.run(_decoder_inputs(model, ids[:, :end], 0))
            assert_close({"logits": logits}, {"logits": whole["logits"][:, -1, :]}, 1e-4)
            for cache in model.manifest.caches:
                assert_close({"x": held[cache.input][:, :, :end]}, {"x": whole[cache.output]}, 1e-4)
        assert places[0] == places[1] == places[2]
        assert places[3] == places[4]


def test_a_step_that_fails_while_caches_grow_leaves_what_they_hold(
    in_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_CAPACITY_STEP", 4)
    ids = np.random.default_rng(1).integers(0, 90, (1, 6))
    with _load(in_place) as model:
        whole = model.run(_decoder_inputs(model, ids, 0))["logits"]
        run, block = ShardSession.run, sum(shard.role == "block" for shard in model.manifest.shards) - 1
        for held in (0, 4):
            with model.new_state() as state:
                if held:
                    model.step(_decoder_inputs(model, ids[:, :held], 0), state)

                def fail(session: ShardSession, *given: Any) -> Any:
                    if session._name == f"block.{block:03d}":
                        raise pipeload.RunError("Shard 'block' failed: test")
                    return run(session, *given)

                with monkeypatch.context() as patch:
                    patch.setattr(ShardSession, "run", fail)
                    with pytest.raises(pipeload.RunError):
                        model.step(_decoder_inputs(model, ids[:, held:], held), state)
                # The caches of the blocks before have grown.
                assert (state.length, state.capacity) == (held, 2 * held)
                logits = model.step(_decoder_inputs(model, ids[:, held:], held), state)[:, -1]
                assert_close({"logits": logits}, {"logits": whole[:, -1, :]}, 1e-4)


def test_a_cache_in_place_counts_once(in_place: Path) -> None:
    with _load(in_place) as model:
        ids = np.random.default_rng(1).integers(0, 90, (2, 7))
        outputs = model.run(_decoder_inputs(model, ids, 0))
        held = sum(outputs[cache.output].nbytes for cache in model.manifest.caches)
        dims = {"batch_size": 2, "sequence_length": 7, "past_sequence_length": 0}
        assert needs.cache_bytes(model.manifest, dims) == held


def test_several_states_do_not_disturb_each_other(toy_decoder: Path) -> None:
    with _load(toy_decoder) as model, model.new_state() as one, model.new_state() as two:
        ids = np.arange(10).reshape(1, 10)
        for k in range(5):
            model.step(_decoder_inputs(model, ids[:, k : k + 1], k), one)
            model.step(_decoder_inputs(model, ids[:, 9 - k : 10 - k], k), two)
        expected = model.run(_decoder_inputs(model, ids[:, :6], 0))["logits"][:, -1]
        assert_close({"x": model.step(_decoder_inputs(model, ids[:, 5:6], 5), one)[:, -1]}, {"x": expected}, 1e-5)


def test_a_failed_step_leaves_the_state_as_it_was(toy_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(6).reshape(1, 6)
    with _load(toy_decoder, smallest_budget(toy_decoder)) as model, model.new_state() as state:
        model.step(_decoder_inputs(model, ids[:, :5], 0), state)
        before = dict(state.caches)
        with pytest.raises(pipeload.ConfigError):
            model.step(_decoder_inputs(model, ids[:, 5:] + 10**6, 5), state)
        assert (state.length, state.caches) == (5, before)
        logits = model.step(_decoder_inputs(model, ids[:, 5:], 5), state)[:, -1]
        assert_close({"x": logits}, {"x": model.run(_decoder_inputs(model, ids, 0))["logits"][:, -1]}, 1e-5)


def test_a_state_that_does_not_fit_is_refused_and_hinders_nobody(toy_decoder: Path) -> None:
    with _load(toy_decoder, smallest_budget(toy_decoder) + 2_000_000) as model, model.new_state() as state:
        long = np.zeros((1, 60_000), np.int64)
        with pytest.raises(pipeload.BudgetError):
            model.step(_decoder_inputs(model, long, 0), state)
        # Neither the others nor the state itself: what it did not get it does not hold.
        model.run(toys.inputs(1, 3))
        model.step(_decoder_inputs(model, long[:, :3], 0), state)


def test_a_closed_state_is_refused(toy_decoder: Path) -> None:
    with _load(toy_decoder) as model:
        with model.new_state() as state:
            model.step(_decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)
        assert not state.caches
        state.close()
        with pytest.raises(pipeload.ClosedError, match="decode state is closed"):
            model.step(_decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)


def test_a_state_of_another_model_is_refused(toy_decoder: Path) -> None:
    with _load(toy_decoder) as model, _load(toy_decoder) as other, model.new_state() as state:
        with pytest.raises(pipeload.ConfigError, match="the caches of another model"):
            other.step(_decoder_inputs(other, np.zeros((1, 2), np.int64), 0), state)
        assert state.length == 0
        model.step(_decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)


def test_open_states_are_counted_until_they_are_closed_or_forgotten(toy_decoder: Path) -> None:
    with _load(toy_decoder) as model:
        state, other = model.new_state(10_000), model.new_state(10_000)
        model.run(toys.inputs(1, 1))
        two = model.plan.cache_bytes
        assert two >= 2 * 4 * 10_000 * 64 * 4
        state.close()
        # What was needed lately may be needed again soon: the plan counts it for some more passes.
        for _ in range(20):
            model.run(toys.inputs(1, 1))
        assert model.plan.cache_bytes == two // 2
        del other
        gc.collect()
        for _ in range(20):
            model.run(toys.inputs(1, 1))
        assert model.plan.cache_bytes == 0


# Wrong arguments


def test_all_faults_of_the_inputs_are_named_at_once(toy: Path) -> None:
    wrong: dict[str, Any] = {
        "input_ids": toys.inputs()["input_ids"].astype(np.int32),
        "token_type_ids": np.zeros((2, 5), np.int64),
        "position": [1, 2, 3],
    }
    with _load(toy) as model:
        with pytest.raises(pipeload.ConfigError) as caught:
            model.run(wrong)
        for words in (
            "'attention_mask' is missing",
            "'input_ids' has dtype int32, the model takes int64",
            "'token_type_ids' is no input",
            "'position' is a list, not a NumPy array",
            "It takes input_ids: int64",
        ):
            assert words in str(caught.value)


def test_faults_of_shape_are_named_with_those_of_dtype(toy: Path) -> None:
    wrong = {"input_ids": np.zeros((2, 5, 1), np.int64), "attention_mask": np.zeros((2, 5), np.float32)}
    with _load(toy) as model, pytest.raises(pipeload.ConfigError) as caught:
        model.run(wrong)
    assert "'input_ids' has 3 dimensions" in str(caught.value)
    assert "'attention_mask' has dtype float32" in str(caught.value)


def test_shapes_that_contradict_each_other_are_named(toy: Path) -> None:
    with _load(toy) as model, pytest.raises(pipeload.ConfigError, match="'attention_mask' has size 6"):
        model.run(toys.inputs(2, 5) | {"attention_mask": np.ones((2, 6), np.int64)})


@pytest.mark.parametrize("index", [toys.VOCABULARY, -toys.VOCABULARY - 1, 2**62])
def test_a_token_beyond_the_table_is_named(toy: Path, index: int) -> None:
    with _load(toy, smallest_budget(toy)) as model:
        inputs = toys.inputs()
        inputs["input_ids"][1, 2] = index
        with pytest.raises(pipeload.ConfigError, match=f"'input_ids' is out of range: {index} is no row"):
            model.run(inputs)
        model.run(toys.inputs())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loaders": 0}, "loaders is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"sizes": {"width": 3}}, r"no dimension \['width'\]"),
        ({"sizes": {"batch_size": -1}}, "batch_size"),
        ({"sizes": {"batch_size": "many"}}, "batch_size"),
        ({"memory_budget": "much"}, "'much' is no size"),
        ({"memory_budget": 0}, "is positive"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_named(toy: Path, options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(pipeload.ConfigError, match=words):
        pipeload.load(toy, **options)


def test_a_directory_without_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(pipeload.ManifestError, match="is not a sharded model directory"):
        pipeload.load(tmp_path)


def test_a_path_may_be_a_text(toy: Path) -> None:
    with pipeload.load(str(toy), "auto") as model:
        assert_close(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=1), 1e-5)


# Budgets


def test_too_small_a_budget_is_refused_before_anything_is_read(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        pytest.fail("something was read")

    with monkeypatch.context() as patch:
        for name in ("graph", "read_weights", "read_rows"):
            patch.setattr(Storage, name, read)
        with pytest.raises(pipeload.BudgetError) as caught:
            pipeload.load(toy_large, "30MB")
        assert agents() == []
    message, needed = str(caught.value), caught.value.needed_bytes
    assert "'block.000' with 4.2 MB" in message
    assert str(needed) in message
    assert caught.value.budget_bytes == 30_000_000
    with _load(toy_large, needed) as model:
        assert model.plan.peak_bytes <= needed
        assert_same(model.run(toys.inputs()), run_sequentially(toy_large, toys.inputs(), threads=THREADS))


@pytest.mark.usefixtures("unlearning")
@pytest.mark.skipif(EMULATED, reason="three minutes under qemu, and no other code runs there")
def test_larger_inputs_make_resident_shards_leave(toy_large: Path, fixed_profile: Profile) -> None:
    budget = smallest_budget(toy_large) + 33_000_000
    with _load(toy_large, budget) as model:
        assert len(model.plan.resident) >= 3
        seen = [len(model.plan.resident)]
        for batch in (1, 2, 4):
            inputs = toys.inputs(batch, 128)
            assert_same(model.run(inputs), run_sequentially(toy_large, inputs, threads=THREADS))
            assert model.plan.peak_bytes <= budget
            seen.append(len(model.plan.resident))
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] < seen[0]


def test_inputs_that_are_too_large_are_refused_and_smaller_ones_work(toy_large: Path, fixed_profile: Profile) -> None:
    with _load(toy_large, smallest_budget(toy_large)) as model:
        model.run(toys.inputs(1, 8))
        with pytest.raises(pipeload.BudgetError, match="pass smaller inputs") as caught:
            model.run(toys.inputs(64, 512))
        assert_same(model.run(toys.inputs(1, 8)), run_sequentially(toy_large, toys.inputs(1, 8), threads=THREADS))
    with _load(toy_large, caught.value.needed_bytes, sizes={"batch_size": 64, "sequence_length": 512}) as model:
        assert model.plan.peak_bytes <= caught.value.needed_bytes


def test_planned_sizes_are_counted(toy_large: Path, fixed_profile: Profile) -> None:
    small = smallest_budget(toy_large)
    assert smallest_budget(toy_large, sizes={"batch_size": 64}) > small + 64 * 128 * 1024 * 4


def test_a_streamed_model_occupies_no_more_than_its_budget(toy_large: Path) -> None:
    budget = smallest_budget(toy_large)
    with _load(toy_large, budget) as model:
        for _ in range(5):
            model.run(toys.inputs(1, 32))
            assert rss_bytes() <= budget
        assert model.plan.streamed_bytes > 0


@no_subprocess
@pytest.mark.parametrize("more", [0, 8_000_000, 20_000_000, 45_000_000, 80_000_000])
def test_a_process_never_occupied_more_than_its_budget(toy_large: Path, more: int) -> None:
    """The peak of a process of its own, over streaming, partly resident shards, re-planning and packing."""
    program = f"""
import pipeload
from tests.engine import toy
try:
    pipeload.load({str(toy_large)!r}, 1)
except pipeload.BudgetError as error:
    budget = error.needed_bytes + {more}
with pipeload.load({str(toy_large)!r}, budget) as model:
    for _ in range(8):
        model.run(toy.inputs(1, 64))
    assert model.stats.budget_bytes <= budget
    print(model.stats.peak_bytes - budget)
"""
    assert int(run_python(program).stdout) <= 0


@pytest.mark.usefixtures("unlearning")
def test_a_budget_may_be_set_at_any_time(toy_large: Path, fixed_profile: Profile) -> None:
    expected = run_sequentially(toy_large, toys.inputs(), threads=THREADS)
    budgets = _budgets(toy_large, fixed_profile)
    tight, roomy = budgets["1 buffers, some resident"], budgets["all resident"]
    with _load(toy_large, roomy, profile=_fast_profile(toy_large)) as model:
        assert_same(model.run(toys.inputs()), expected)
        model.set_budget(tight)
        assert model.plan.peak_bytes <= model.plan.budget_bytes == tight
        assert model.plan.streamed_bytes > 0
        assert_same(model.run(toys.inputs()), expected)
        model.set_budget(f"{roomy // 1000}kB")
        assert_same(model.run(toys.inputs()), expected)
        assert not model.plan.streamed_bytes
        model.set_budget("auto")
        assert model.plan.budget_bytes > roomy
        with pytest.raises(pipeload.BudgetError):
            model.set_budget(1)
        for wrong in ("much", 0, -5):
            with pytest.raises(pipeload.ConfigError):
                model.set_budget(wrong)
        assert model.plan.budget_bytes > roomy
    with pytest.raises(pipeload.ClosedError):
        model.set_budget(tight)


# What the caller says and what the engine tells


def _fast_profile(directory: Path) -> Profile:
    """Reading takes longest, and packing gains nothing."""
    times = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-2, packed_run_s=1e-4)
    shards = {shard.name: times for shard in manifests.read(directory).shards}
    return Profile(process_bytes=1, cores=99, read_bytes_per_s={1: 1e9}, times={THREADS: shards})


def test_a_profile_is_used_as_it_is(toy_large: Path) -> None:
    given = _fast_profile(toy_large)
    with _load(toy_large, smallest_budget(toy_large), profile=given) as model:
        plan = model.plan
        assert plan.steady_pass_s == pytest.approx(plan.streamed_bytes / 1e9, rel=0.2)
        assert plan.first_pass_s is not None
        assert model.profile.times == given.times
        # What the process and the machine are is measured always.
        assert model.profile.process_bytes > 10_000_000
        assert model.profile.cores < 99
        assert model.stats.peak_read_bytes_per_s == 1e9


def test_passes_teach_where_nothing_was_measured(toy_large: Path) -> None:
    with _load(toy_large, smallest_budget(toy_large)) as model:
        assert not model.profile.measured
        assert model.plan.steady_pass_s is None
        model.run(toys.inputs())
        # It learns behind the answer, and before the next call.
        model.run(toys.inputs())
        assert model.profile.measured
        assert model.plan.steady_pass_s is not None
        assert set(model.profile.times) == {THREADS}


def _close(model: pipeload.Model) -> None:
    model.close()


def _tie(model: Any) -> None:
    model.itself = model


@pytest.mark.parametrize("end", [_close, _tie, lambda _: None], ids=["closed", "collected in a cycle", "forgotten"])
def test_what_passes_taught_is_kept_however_the_model_ends(
    toy: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[pipeload.Model], None]
) -> None:
    monkeypatch.setattr(Replanner, "learned", Replanner.profile)
    monkeypatch.chdir(toy.parent)
    model = _load(Path(toy.name))
    monkeypatch.chdir("/")
    model.run(toys.inputs())
    model.run(toys.inputs())
    dims, learned = model._profile_dims, model.profile
    assert profile_store.find(toy, dims) is None
    end(model)
    del model
    gc.collect()
    kept = profile_store.find(toy, dims)
    assert kept is not None
    assert kept.measured
    assert set(kept.times) == set(learned.times)


def test_a_given_profile_is_not_kept(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replanner, "learned", Replanner.profile)
    with _load(toy, profile=_fast_profile(toy)) as model:
        model.run(toys.inputs())
        dims = model._profile_dims
    assert profile_store.find(toy, dims) is None


@pytest.mark.usefixtures("unlearning")
def test_statistics_tell_about_the_latest_pass(toy_large: Path) -> None:
    shape = toys.inputs()["input_ids"].shape
    sizes = {"batch_size": shape[0], "sequence_length": shape[1]}
    with _load(toy_large, smallest_budget(toy_large), profile=_fast_profile(toy_large), sizes=sizes) as model:
        assert model.stats.last is None
        for _ in range(3):
            model.run(toys.inputs())
        stats = model.stats
        last = stats.last
        assert last is not None
        assert (stats.passes, stats.last_pass_s) == (3, last.seconds)
        assert stats.budget_bytes == model.plan.budget_bytes
        assert 0 < last.read_bytes <= model.manifest.weight_bytes * 1.01
        assert 0 < last.read_s <= last.seconds
        assert last.bound_s is not None
        assert last.efficiency == pytest.approx(last.bound_s / last.seconds)
        inference = last.agents["inference"]
        assert inference.busy_s + inference.wait_s == pytest.approx(last.seconds)
        assert stats.read_bytes >= 3 * model.plan.streamed_bytes


def test_progress_is_told_and_its_errors_reach_the_caller(toy: Path) -> None:
    told: list[Progress] = []

    def note(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 11:
            raise ValueError("mine")

    with _load(toy, smallest_budget(toy), progress=note) as model:
        expected = run_sequentially(toy, toys.inputs(), threads=THREADS)
        _check_until_packed(model, toys.inputs(), expected)
        assert [progress.index for progress in told] == list(range(1, 9))
        assert told[-1].eta_s == pytest.approx(0)
        with pytest.raises(ValueError, match="mine"):
            model.run(toys.inputs())
        _check_until_packed(model, toys.inputs(), expected)
        assert model.stats.passes == 2


def test_files_are_hashed_once_for_all_processes_and_damage_is_still_found(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stamping.time.time_ns
    monkeypatch.setattr(stamping, "time", SimpleNamespace(time_ns=lambda: real() + 10**12))
    with _load(toy_copy, smallest_budget(toy_copy)) as model:
        for _ in range(2):
            model.run(toys.inputs())
    with monkeypatch.context() as patch:
        patch.setattr("pipeload.storage.weights.hashlib", None)
        with _load(toy_copy, smallest_budget(toy_copy)) as model:
            model.run(toys.inputs())
    path = toy_copy / "shards" / "block.003.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    os.utime(path, ns=times)
    with _load(toy_copy, smallest_budget(toy_copy)) as model:
        with pytest.raises(pipeload.ShardError, match=r"block\.003\.safetensors' is damaged"):
            model.run(toys.inputs())
    with _load(toy_copy, smallest_budget(toy_copy), verify=False) as model:
        model.run(toys.inputs())


# Many inputs


_MIXED = [(1, 5), (1, 5), (2, 5), (1, 7), (1, 7), (1, 5), (3, 5)]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_many_inputs_give_what_each_would_give_alone(toy: Path, batch: int) -> None:
    items = [toys.inputs(rows, length, seed=k) for k, (rows, length) in enumerate(_MIXED)]
    with _load(toy, smallest_budget(toy)) as model:
        results = list(model.run_many(items, batch=batch))
        assert len(results) == len(items)
        for item, result in zip(items, results, strict=True):
            # A batch is another shape of the matrices, whose kernels may sum in another order.
            assert_close(result, run_sequentially(toy, item, threads=THREADS), 1e-5)
        # A batch that waits may share the sweep of another one.
        assert 2 <= model.stats.passes <= {1: 7, 2: 4, 3: 3, 100: 3}[batch]


def test_many_inputs_without_batches_are_bit_for_bit(toy: Path) -> None:
    items = [toys.inputs(1, 5, seed=seed) for seed in range(4)]
    with _load(toy, smallest_budget(toy)) as model:
        results = list(model.run_many(items))
        if not any(span.kind == "pack" for span in model.trace.spans):
            for item, result in zip(items, results, strict=True):
                assert_same(result, run_sequentially(toy, item, threads=THREADS))


def test_no_inputs_give_no_outputs(toy: Path) -> None:
    with _load(toy) as model:
        assert list(model.run_many([])) == []
        with pytest.raises(pipeload.ConfigError, match="batch is 0"):
            list(model.run_many([], batch=0))


@pytest.mark.parametrize("batch", [1, 3])
def test_endless_inputs_are_taken_as_they_are_needed(toy: Path, batch: int) -> None:
    taken = []

    def items() -> Iterator[dict[str, Any]]:
        for number in count():
            taken.append(number)
            yield toys.inputs(1, 5, seed=number)

    with _load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many(items(), batch=batch)
        assert taken == []
        for number, _ in enumerate(islice(outputs, 9), start=1):
            # The batch whose answer this is, and the one that is queued behind it.
            assert len(taken) <= (-(-number // batch) + 1) * batch
        outputs.close()
        assert model._pipeline._exchange.idle or Background(model.run, toys.inputs()).wait() is None


def test_giving_up_early_leaves_nothing_running(toy: Path) -> None:
    with _load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many(toys.inputs(seed=seed) for seed in count())
        next(outputs)
        outputs.close()
        # The call that was queued was withdrawn: whatever comes next is served at once.
        model.run(toys.inputs())
        assert model._pipeline._exchange.idle or not model._pipeline._exchange._requests
        assert model.stats.passes <= 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_faulty_item_is_named_and_the_others_before_it_are_answered(toy: Path, batch: int) -> None:
    good, bad = toys.inputs(1, 5), {"input_ids": np.zeros((1, 5), np.int32)}
    with _load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many([good, good, good, bad, good], batch=batch)
        next(outputs)
        with pytest.raises(pipeload.ConfigError, match="'attention_mask' is missing"):
            list(outputs)
        assert next(outputs, None) is None
        model.run(good)


def test_an_error_of_the_iterable_reaches_the_caller(toy: Path) -> None:
    def items() -> Iterator[dict[str, Any]]:
        yield toys.inputs()
        raise OSError("mine")

    with _load(toy, smallest_budget(toy)) as model:
        with pytest.raises(OSError, match="mine"):
            list(model.run_many(items()))
        model.run(toys.inputs())


def test_closing_ends_many_inputs(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _gated_reads(monkeypatch, "block.003")
    model = _load(toy, smallest_budget(toy))
    call = Background(list, model.run_many(toys.inputs(seed=seed) for seed in count()))
    gate.wait_reached()
    closing = Background(model.close)
    assert isinstance(call.wait(), pipeload.ClosedError)
    gate.open()
    closing.end()


# Damage, through the whole engine


@pytest.mark.parametrize("packed", [False, True], ids=["streamed", "packed"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
        lambda path: shutil.copy(path.with_name("block.002.safetensors"), path),
    ],
    ids=["missing", "truncated", "grown", "flipped", "foreign"],
)
def test_a_damaged_shard_is_named_and_never_used(toy_copy: Path, damage: Callable[[Path], None], packed: bool) -> None:
    path = toy_copy / "shards" / "block.003.safetensors"
    whole = path.read_bytes()
    damage(path)
    with _load(toy_copy, PLENTY if packed else smallest_budget(toy_copy)) as model:
        assert model.plan.packed is packed
        for _ in range(2):
            with pytest.raises(pipeload.ShardError, match=r"'shards/block\.003\.safetensors'"):
                model.run(toys.inputs())
        path.write_bytes(whole)
        # What was tried ahead may have failed once more before the file was whole.
        answers = [Background(model.run, toys.inputs()) for _ in range(2)]
        answers[0].wait()
        assert_close(answers[1].end(), run_sequentially(toy_copy, toys.inputs(), threads=THREADS), 1e-5)


def test_a_shard_truncated_between_two_passes_is_named(toy_copy: Path) -> None:
    path = toy_copy / "shards" / "block.003.safetensors"
    with _load(toy_copy, smallest_budget(toy_copy), loaders=1) as model:
        model.run(toys.inputs())
        os.truncate(path, 5000)
        # It may have been read ahead before.
        outcomes = [Background(model.run, toys.inputs()).wait() for _ in range(3)]
        words = [str(error) for error in outcomes if isinstance(error, pipeload.ShardError)]
        assert words
        assert all("'shards/block.003.safetensors' has 5000 bytes" in text for text in words)


# Several callers


def test_several_threads_get_their_own_answers(toy: Path) -> None:
    cases = [toys.inputs(1 + k % 3, 2 + k, seed=k) for k in range(6)]
    expected = [run_sequentially(toy, inputs, threads=THREADS) for inputs in cases]
    with _load(toy, smallest_budget(toy) + 1_000_000) as model:
        barrier = threading.Barrier(len(cases))

        def call(k: int) -> None:
            barrier.wait(PATIENCE_S)
            for _ in range(8):
                assert_same(model.run(cases[k]), expected[k])

        for caller in [Background(call, k) for k in range(len(cases))]:
            caller.end()
        # One sweep serves all who wait.
        assert 8 <= model.stats.passes <= 8 * len(cases)


def test_two_models_work_beside_each_other(toy: Path, toy_decoder: Path) -> None:
    expected = [run_sequentially(path, toys.inputs(), threads=THREADS) for path in (toy, toy_decoder)]
    with _load(toy, smallest_budget(toy)) as one, _load(toy_decoder, smallest_budget(toy_decoder)) as two:

        def call(k: int) -> None:
            for _ in range(10):
                assert_same((one, two)[k].run(toys.inputs()), expected[k])

        callers = [Background(call, k % 2) for k in range(4)]
        for caller in callers:
            caller.end()
        one.close()
        assert_same(two.run(toys.inputs()), expected[1])


def test_one_directory_may_be_open_twice(toy: Path) -> None:
    with _load(toy, smallest_budget(toy)) as one, _load(toy, smallest_budget(toy)) as two:
        assert_same(one.run(toys.inputs()), two.run(toys.inputs()))


def test_the_hosts_own_sessions_go_on_working(toy: Path) -> None:
    manifest = manifests.read(toy)
    graph = str(toy / manifest.shards[-1].graph.path)
    hidden = {"hidden.6": np.ones((1, 2, 64), np.float32)}
    host = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    before = host.run(None, hidden)[0]
    with _load(toy, smallest_budget(toy)) as model:
        calls = [Background(model.run, toys.inputs()) for _ in range(3)]
        np.testing.assert_array_equal(host.run(None, hidden)[0], before)
        # Made with all defaults, while the model runs: nothing process-wide was changed.
        again = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(again.run(None, hidden)[0], before)
        for call in calls:
            call.end()
    np.testing.assert_array_equal(host.run(None, hidden)[0], before)


def _gated_reads(monkeypatch: pytest.MonkeyPatch, at: str) -> Gate:
    """Reading this shard stops at a gate."""
    gate, real = Gate(), Storage.read_weights

    def read(self: Storage, shard: Any, *rest: Any, **options: Any) -> bool:
        if shard.name == at:
            gate.stop_here()
        return real(self, shard, *rest, **options)

    monkeypatch.setattr(Storage, "read_weights", read)
    return gate


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background of a shell ignores Ctrl-C: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(EMULATED, reason="signals do not interrupt waits reliably under qemu")
def test_an_interrupted_caller_is_free_at_once_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _gated_reads(monkeypatch, "prologue")
    with _load(toy, smallest_budget(toy)) as model:
        gate.wait_reached()
        waits, heard = threading.Event(), threading.Event()
        submit = model._pipeline._exchange.submit
        monkeypatch.setattr(model._pipeline._exchange, "submit", lambda request: (submit(request), waits.set()))

        def hear(number: int, frame: Any) -> None:
            if not heard.is_set():
                heard.set()
                signal.default_int_handler(number, frame)

        def interrupt() -> None:
            assert waits.wait(PATIENCE_S)
            # Again and again: CPython does not wake a wait by a signal that comes just before it.
            while not heard.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                heard.wait(0.1)

        before = signal.signal(signal.SIGINT, hear)
        interrupting = Background(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.run(toys.inputs())
            interrupting.end()
        finally:
            heard.set()
            signal.signal(signal.SIGINT, before)
        gate.open()
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))


def test_memory_that_the_system_refuses_is_named_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(buffers.mmap, "mmap", refuse)
        with _load(toy, smallest_budget(toy)) as model:
            with pytest.raises(pipeload.LoadError, match=r"no memory for a buffer of \d+ bytes"):
                model.run(toys.inputs())
            patch.undo()
            assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))


# The end


def test_closing_during_a_call_ends_it(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _gated_reads(monkeypatch, "block.003")
    model = _load(toy, smallest_budget(toy))
    calls = [Background(model.run, toys.inputs()) for _ in range(3)]
    gate.wait_reached()
    closing = Background(model.close)
    assert all(isinstance(call.wait(), pipeload.ClosedError) for call in calls)
    gate.open()
    closing.end()
    assert agents() == []


def test_a_closed_model_is_refused_everywhere(toy_decoder: Path) -> None:
    with _load(toy_decoder) as model:
        state = model.new_state()
    assert agents() == []
    model.close()
    for call in (
        lambda: model.run(toys.inputs()),
        lambda: model.step(toys.inputs(), state),
        model.new_state,
        model.__enter__,
    ):
        with pytest.raises(pipeload.ClosedError, match="The model is closed"):
            call()
    assert model.plan.threads == THREADS
    assert model.stats.passes == 0


def test_an_exception_in_the_block_closes_the_model(toy: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), _load(toy):
        raise RuntimeError("mine")
    assert agents() == []


def test_several_may_close_at_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _gated_reads(monkeypatch, "prologue")
    model = _load(toy, smallest_budget(toy))
    gate.wait_reached()

    def close() -> list[str]:
        model.close()
        return agents()

    closing = [Background(close) for _ in range(3)]
    while not model._pipeline._exchange.closed:
        model._pipeline._exchange.notify()
    gate.open()
    for call in closing:
        assert call.end() == [], "close returned before the threads had ended"


def test_a_forgotten_model_leaves_no_threads(toy: Path) -> None:
    model = _load(toy, smallest_budget(toy))
    model.run(toys.inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert agents() == []


def test_a_forgotten_model_with_a_tokenizer_leaves_no_threads(toy_copy: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(toy_copy)
    model = _load(toy_copy, smallest_budget(toy_copy))
    assert tokenizer_of(model) is tokenizer_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert agents() == []


def test_a_forgotten_model_in_a_cycle_leaves_no_threads(toy: Path) -> None:
    model: Any = _load(toy, smallest_budget(toy))
    model.itself = model
    del model
    gc.collect()
    assert agents() == []


def test_a_model_that_an_agent_collects_leaves_no_threads(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = Gate(), Storage.read_weights

    def collect(self: Storage, *arguments: Any, **options: Any) -> bool:
        gate.stop_here()
        gc.collect()
        return real(self, *arguments, **options)

    monkeypatch.setattr(Storage, "read_weights", collect)
    gc.disable()
    try:
        model: Any = _load(toy, smallest_budget(toy), loaders=1)
        model.itself = model
        threads = model._pipeline._threads
        gone = weakref.ref(model)
        gate.wait_reached()
        del model
        gate.open()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        gc.enable()
    assert gone() is None
    for thread in threading.enumerate():
        if thread.name == "pipeload-closer":
            thread.join(PATIENCE_S)
    assert agents() == []


@no_subprocess
@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "model.run(inputs)",
        "threading.Thread(target=go_on, daemon=True).start()",
        "model.itself = model; del model",
        "sys.exit(0)",
        "os.kill(os.getpid(), signal.SIGINT)",
        "raise ValueError('mine')",
    ],
)
def test_the_interpreter_ends_cleanly_without_close(toy: Path, end: str) -> None:
    program = f"""
import contextlib, os, signal, sys, threading
import pipeload
from pipeload.planning.replanner import Replanner
from tests.engine import toy
Replanner.learned = Replanner.profile
signal.signal(signal.SIGINT, signal.default_int_handler)
inputs = toy.inputs()
try:
    pipeload.load({str(toy)!r}, 1)
except pipeload.BudgetError as error:
    model = pipeload.load({str(toy)!r}, error.needed_bytes)
model.run(inputs)
def go_on():
    with contextlib.suppress(pipeload.ClosedError):
        while True:
            model.run(inputs)
{end}
"""
    expected = {"raise ValueError('mine')": 1, "os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT}.get(end, 0)
    done = run_python(program, expected)
    if expected == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.strip().splitlines()[-1] in ("ValueError: mine", "KeyboardInterrupt")
    assert profile_store.find(toy, needs.planning_dims(manifests.read(toy))) is not None


# Processes


@no_subprocess
def test_a_forked_child_is_refused_and_the_parent_goes_on(toy_decoder: Path) -> None:
    expected = run_sequentially(toy_decoder, toys.inputs(), threads=THREADS)
    with _load(toy_decoder, smallest_budget(toy_decoder)) as model:
        state = model.new_state()
        assert_same(model.run(toys.inputs()), expected)
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            words = []
            for call in (lambda: model.run(toys.inputs()), lambda: model.step(toys.inputs(), state), model.new_state):
                try:
                    call()
                    words.append("worked")
                except BaseException as error:  # noqa: BLE001 - the parent looks at it
                    words.append(f"{type(error).__name__}: {error}")
            # Harmless: the threads are the parent's.
            model.close()
            os.write(writer, "\n".join(words).encode())
            os._exit(0)
        os.close(writer)
        try:
            with open(reader) as file:
                words = file.read().splitlines()
            assert os.waitpid(child, 0)[1] == 0
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        assert len(words) == 3
        for line in words:
            assert line.startswith("ConfigError: This model was opened in process")
            assert "Load the model after the fork" in line
        for _ in range(3):
            assert_same(model.run(toys.inputs()), expected)


def test_pickling_and_copying_are_refused(toy: Path) -> None:
    with _load(toy) as model:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(pipeload.ConfigError, match="cannot be pickled"):
                attempt(model)
        model.run(toys.inputs())


# Nothing grows


def test_a_thousand_passes_leave_threads_descriptors_and_memory_as_they_were(
    toy: Path, descriptors: Callable[[], int]
) -> None:
    # Until then the trace grows.
    passes, warm = (100, 40) if EMULATED else (1000, 400)
    with _load(toy, smallest_budget(toy), threads=1) as model:
        assert model.plan.streamed_bytes > 0
        for number in range(passes):
            model.run(toys.inputs(1, 1 + number % 7))
            if number == warm:
                before = (threading.active_count(), rss_bytes(), descriptors())
        assert threading.active_count() == before[0]
        # The emulator's own memory grows as it translates more code.
        assert EMULATED or rss_bytes() - before[1] < 4_000_000
        # Each loader may have a file open at one of the two moments.
        assert abs(descriptors() - before[2]) <= 2 * model.plan.loaders
    assert model.stats.passes == passes


def test_opening_and_closing_leaves_nothing(toy: Path, descriptors: Callable[[], int]) -> None:
    def cycle() -> None:
        with _load(toy, smallest_budget(toy)) as model:
            model.run(toys.inputs())

    for _ in range(10):
        cycle()
    before = (threading.active_count(), descriptors(), rss_bytes())
    for _ in range(10 if EMULATED else 40):
        cycle()
    assert (threading.active_count(), descriptors()) == before[:2]
    # The emulator's own memory grows as it translates more code.
    assert EMULATED or rss_bytes() - before[2] < 4_000_000


@pytest.mark.skipif(EMULATED, reason="RSS counts what the emulator holds")
@pytest.mark.parametrize("packed", [False, True], ids=["streamed", "packed"])
def test_a_closed_model_gives_its_memory_back(toy_large: Path, packed: bool) -> None:
    with _load(toy_large, PLENTY if packed else smallest_budget(toy_large) + 10_000_000) as model:
        model.run(toys.inputs())
        plan = model.plan
        assert plan.packed is packed
        exchange = model._pipeline._exchange
        if not packed:
            # What is read ahead for the next pass is there.
            with exchange._changed:
                assert exchange._changed.wait_for(lambda: len(exchange._ready) == plan.buffers, 30)
        held = rss_bytes()
    # The model is closed, and still referred to.
    weights = plan.buffers * plan.buffer_bytes if plan.streamed_bytes else model.manifest.weight_bytes
    assert held - rss_bytes() > 0.8 * weights
