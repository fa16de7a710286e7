"""The bounds on intermediate tensors are exact where the sizes are polynomials, and never below the needs of a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.exporter.conftest import Sharded

from pipeload_export.shard.activations import fit, live_bytes
from pipeload_export.shard.trial import Event

POINTS = [{"b": b, "s": s} for b in (1, 2, 3) for s in (4, 6, 9)]


def steps(*formulas: Callable[[int, int], int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array([[formula(p["b"], p["s"]) for formula in formulas] for p in POINTS], np.int64)


def test_polynomials_are_found_exactly() -> None:
    found = fit(("b", "s"), POINTS, steps(lambda b, s: 48 + 128 * b * s + 16 * b * s * s))
    assert len(found.activations) == 1
    assert found.activation_bytes({"b": 7, "s": 100}) == 48 + 128 * 700 + 16 * 70_000


def test_dominated_steps_are_dropped_and_others_kept() -> None:
    found = fit(
        ("b", "s"),
        POINTS,
        steps(lambda b, s: 4 * b * s, lambda b, s: 8 * b * s, lambda b, s: b * s * s, lambda *_: 2),
    )
    assert found.activation_bytes({"b": 1, "s": 2}) == 16
    assert found.activation_bytes({"b": 1, "s": 100}) == 10_000
    assert len(found.activations) <= 3


def test_a_bound_that_is_no_polynomial_is_above_every_sample() -> None:
    table = steps(lambda b, s: 100 * (s // 4) + b)
    found = fit(("b", "s"), POINTS, table)
    for point, (nbytes,) in zip(POINTS, table.tolist(), strict=True):
        assert found.activation_bytes(point) >= nbytes


def _image_points(step: int) -> list[dict[str, int]]:
    return [{"b": b, "h": h * step, "w": w * step} for b in (1, 2, 3) for h in (1, 2, 3) for w in (1, 2, 3)]


def _attention(point: dict[str, int]) -> int:
    """Scores of four heads over patches of 14 pixels and one token more, rounded as no polynomial is."""
    patches = (point["h"] // 14) * (point["w"] // 14) + 1
    return 16 * point["b"] * patches**2 + 64 * patches


def test_sizes_in_steps_are_found_exactly_and_bound_those_between() -> None:
    points = _image_points(14)
    table = np.array([[_attention(point)] for point in points], np.int64)
    found = fit(("b", "h", "w"), points, table, steps={"h": 14, "w": 14})
    for height, width in ((224, 224), (518, 518), (14, 700)):
        point = {"b": 1, "h": height, "w": width}
        assert found.activation_bytes(point) == _attention(point)
    between = {"b": 1, "h": 230, "w": 500}
    assert _attention(between) <= found.activation_bytes(between) <= 1.2 * _attention(between)


def test_symbols_of_other_parts_of_a_model_leave_no_choice() -> None:
    random = np.random.default_rng(0)
    points = [{name: int(random.integers(1, 4)) for name in ("text", "length", "b", "h", "w")} for _ in range(30)]
    table = np.array([[40 * p["b"] * p["h"] * p["w"] + 100] for p in points], np.int64)
    found = fit(("text", "length", "b", "h", "w"), points, table, steps={"h": 1, "w": 1})
    assert found.activation_bytes({"text": 1, "length": 1, "b": 2, "h": 50, "w": 40}) == 160_100


def test_rounding_noise_does_not_grow_with_the_size() -> None:
    points = _image_points(14)
    table = np.array([[_attention(point) + (point["h"] * point["w"]) % 3] for point in points], np.int64)
    found = fit(("b", "h", "w"), points, table, steps={"h": 14, "w": 14})
    for point, (nbytes,) in zip(points, table.tolist(), strict=True):
        assert nbytes <= found.activation_bytes(point)
    large = {"b": 2, "h": 518, "w": 518}
    assert _attention(large) <= found.activation_bytes(large) <= 1.1 * _attention(large)


def test_many_steps_become_few_formulas_that_bound_them_all() -> None:
    formulas = [lambda b, s, k=k: (20 - k) * b * s + k * s * s for k in range(20)]
    found = fit(("b", "s"), POINTS, steps(*formulas))
    assert len(found.activations) <= 8
    for dims in ({"b": 1, "s": 50}, {"b": 40, "s": 3}):
        assert found.activation_bytes(dims) >= max(formula(dims["b"], dims["s"]) for formula in formulas)


def test_a_model_without_symbols_has_a_constant_bound() -> None:
    assert fit((), [{}], np.array([[10, 30, 20]])).activation_bytes({}) == 30


def test_tensors_are_freed_after_their_last_use_and_views_take_nothing() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["view"]),
        helper.make_node("Relu", ["view"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    value = helper.make_empty_tensor_value_info("y")
    model = helper.make_model(helper.make_graph(nodes, "g", [], [value]))
    events = [Event(node=i, output_bytes=(100,), output_shapes=((25,),)) for i in range(4)]
    assert live_bytes(model, events, {}) == [100, 100, 200, 200]


def test_outputs_stay_to_the_end() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["z"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
    events = [Event(node=i, output_bytes=(8,), output_shapes=((2,),)) for i in range(2)]
    assert live_bytes(model, events, {}) == [8, 16]


def test_a_cache_that_is_written_in_place_takes_nothing() -> None:
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "at"], ["present"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("present", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
    events = [Event(node=i, output_bytes=(8,), output_shapes=((2,),)) for i in range(2)]
    assert live_bytes(model, events, {}) == [0, 8]


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_every_shard_may_at_least_hold_its_outputs(name: str, sharded_architecture: Callable[[str], Sharded]) -> None:
    model = sharded_architecture(name).model
    for item in model.shards:
        assert model.structures[item.structure].activations
    dims = dict.fromkeys(model.dims, 8)
    block = next(item for item in model.shards if item.role == "block")
    assert model.structures[block.structure].activation_bytes(dims) >= 8 * 8 * 64 * 4 or name == "vit"
