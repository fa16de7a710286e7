"""The bounds on intermediate tensors are exact where the sizes are polynomials, and never below the needs of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import pytest
from tests.exporter.conftest import Sharded

from pipeload_export.shard.activations import fit
from pipeload_export.shard.liveness import LiveTensor, live_bytes

POINTS = [{"b": b, "s": s} for b in (1, 2, 3) for s in (4, 6, 9)]


def steps(*formulas: Callable[[int, int], int]) -> list[list[LiveTensor]]:
    """Runs in which each node has one tensor, of this number of bytes."""
    return [nodes(*(formula(p["b"], p["s"]) for formula in formulas)) for p in POINTS]


def nodes(*sizes: int) -> list[LiveTensor]:
    return [LiveTensor(factors=(nbytes,), first=place, last=place) for place, nbytes in enumerate(sizes)]


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
    runs = steps(lambda b, s: 100 * (s // 4) + b)
    found = fit(("b", "s"), POINTS, runs)
    for point, run in zip(POINTS, runs, strict=True):
        assert found.activation_bytes(point) >= max(live_bytes(run))


@pytest.mark.parametrize("part", [3, 4, 5])
def test_a_small_tensor_that_is_no_polynomial_is_bounded_too(part: int) -> None:
    """Less than half a byte for each unit of a dimension is a size all the same."""
    runs = [nodes(-(-p["b"] * p["s"] // part)) for p in POINTS]
    found = fit(("b", "s"), POINTS, runs)
    for point, run in zip(POINTS, runs, strict=True):
        assert found.activation_bytes(point) >= max(live_bytes(run))


def test_images_beside_many_other_sizes_are_bounded() -> None:
    """Where a size depends on all symbols, their monomials are few enough to be listed."""
    random = np.random.default_rng(0)
    symbols = [f"s{number}" for number in range(11)]
    points = [{name: int(random.integers(1, 8)) for name in symbols} for _ in range(30)]
    runs = [nodes(int(random.integers(1, 10_000))) for _ in points]
    found = fit(symbols, points, runs, steps={"s0": 1, "s1": 1})
    for point, run in zip(points, runs, strict=True):
        assert found.activation_bytes(point) >= max(live_bytes(run))


def _image_points(step: int) -> list[dict[str, int]]:
    return [{"b": b, "h": h * step, "w": w * step} for b in (1, 2, 3) for h in (1, 2, 3) for w in (1, 2, 3)]


def _attention(point: dict[str, int]) -> int:
    """Scores of four heads over patches of 14 pixels and one token more, rounded as no polynomial is."""
    patches = (point["h"] // 14) * (point["w"] // 14) + 1
    return 16 * point["b"] * patches**2 + 64 * patches


def test_sizes_in_steps_are_found_exactly_and_bound_those_between() -> None:
    points = _image_points(14)
    runs = [nodes(_attention(point)) for point in points]
    found = fit(("b", "h", "w"), points, runs, steps={"h": 14, "w": 14})
    for height, width in ((224, 224), (518, 518), (14, 700)):
        point = {"b": 1, "h": height, "w": width}
        assert found.activation_bytes(point) == _attention(point)
    between = {"b": 1, "h": 230, "w": 500}
    assert _attention(between) <= found.activation_bytes(between) <= 1.2 * _attention(between)


def test_symbols_of_other_parts_of_a_model_leave_no_choice() -> None:
    random = np.random.default_rng(0)
    points = [{name: int(random.integers(1, 4)) for name in ("text", "length", "b", "h", "w")} for _ in range(30)]
    runs = [nodes(40 * p["b"] * p["h"] * p["w"] + 100) for p in points]
    found = fit(("text", "length", "b", "h", "w"), points, runs, steps={"h": 1, "w": 1})
    assert found.activation_bytes({"text": 1, "length": 1, "b": 2, "h": 50, "w": 40}) == 160_100


def test_rounding_noise_does_not_grow_with_the_size() -> None:
    points = _image_points(14)
    runs = [nodes(_attention(point) + (point["h"] * point["w"]) % 3) for point in points]
    found = fit(("b", "h", "w"), points, runs, steps={"h": 14, "w": 14})
    for point, run in zip(points, runs, strict=True):
        assert max(live_bytes(run)) <= found.activation_bytes(point)
    large = {"b": 2, "h": 518, "w": 518}
    assert _attention(large) <= found.activation_bytes(large) <= 1.1 * _attention(large)


def test_many_steps_become_few_formulas_that_bound_them_all() -> None:
    formulas = [lambda b, s, k=k: (20 - k) * b * s + k * s * s for k in range(20)]
    found = fit(("b", "s"), POINTS, steps(*formulas))
    assert len(found.activations) <= 8
    for dims in ({"b": 1, "s": 50}, {"b": 40, "s": 3}):
        assert found.activation_bytes(dims) >= max(formula(dims["b"], dims["s"]) for formula in formulas)


def test_a_model_without_symbols_has_a_constant_bound() -> None:
    assert fit((), [{}], [nodes(10, 30, 20)]).activation_bytes({}) == 30


def test_parts_of_a_model_that_share_no_symbol_are_told_apart() -> None:
    """A tower of texts beside one of images: far fewer runs than products of their sizes, and another peak for each."""
    random = np.random.default_rng(0)
    symbols = ("texts", "length", "images", "h", "w")
    points = [{name: int(random.integers(1, 4)) for name in symbols} for _ in range(30)]

    def tensors(p: Mapping[str, int]) -> list[LiveTensor]:
        patches = p["h"] * p["w"] + 1
        return [
            LiveTensor(factors=(4, p["texts"], p["length"], 64), first=0, last=2),
            LiveTensor(factors=(4, p["texts"], 4, p["length"], p["length"]), first=1, last=1),
            LiveTensor(factors=(4, p["images"], 4, patches, patches), first=3, last=4),
            LiveTensor(factors=(4, p["images"], p["texts"]), first=4, last=4),
        ]

    found = fit(symbols, points, [tensors(point) for point in points], steps={"h": 1, "w": 1})
    for sizes in ((1, 500, 1, 2, 2), (100, 3, 1, 1, 1), (1, 4, 9, 30, 40), (70, 1, 80, 1, 1), (20, 20, 20, 3, 4)):
        point = dict(zip(symbols, sizes, strict=True))
        assert found.activation_bytes(point) == max(live_bytes(tensors(point)))


def test_one_dimension_that_is_no_polynomial_leaves_the_others_exact() -> None:
    points = [{"b": b, "s": s, "n": n} for b in (1, 2, 3) for s in (4, 6, 9) for n in (2, 5, 7)]

    def tensor(p: Mapping[str, int]) -> LiveTensor:
        return LiveTensor(factors=(4, p["b"], p["n"], p["n"], -(-p["s"] // 4), 64), first=0, last=0)

    found = fit(("b", "s", "n"), points, [[tensor(point)] for point in points])
    for s in (4, 6, 9):
        one, many = ({"b": b, "s": s, "n": n} for b, n in ((1, 1), (50, 90)))
        assert found.activation_bytes(many) == 50 * 90 * 90 * found.activation_bytes(one)
        assert prod(tensor(one).factors) <= found.activation_bytes(one) <= 2 * prod(tensor(one).factors)


def test_runs_that_go_different_ways_are_bounded_by_their_peaks() -> None:
    runs = [
        [LiveTensor(factors=(4, p["b"], p["s"]), first=place, last=place) for place in range(p["b"])] for p in POINTS
    ]
    assert fit(("b", "s"), POINTS, runs).activation_bytes({"b": 5, "s": 50}) == 4 * 5 * 50


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_every_shard_may_at_least_hold_its_outputs(name: str, sharded_architecture: Callable[[str], Sharded]) -> None:
    model = sharded_architecture(name).model
    for item in model.shards:
        assert model.structures[item.structure].activations
    dims = dict.fromkeys(model.dims, 8)
    block = next(item for item in model.shards if item.role == "block")
    assert model.structures[block.structure].activation_bytes(dims) >= 8 * 8 * 64 * 4 or name == "vit"
