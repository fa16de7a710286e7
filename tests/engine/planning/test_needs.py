"""The needs of a pass beside weights: edges, activations, the caller's arrays, caches."""

from __future__ import annotations

from dataclasses import replace

from tests.engine.plans import manifest_of, shard_of

from pipeload.format.manifest import ByteTerm, Cache, Head, Manifest, Structure, TensorSpec
from pipeload.planning.needs import cache_bytes, pass_bytes, planning_dims, tensor_bytes

MB = 1_000_000


def _model() -> Manifest:
    """ids -> [embed] -> a -> [block] -> b -> [top] -> out; the mask is used until the end."""
    specs = {
        "ids": ("int64", ("batch", "length")), "mask": ("float32", ("batch", "length")),
        "a": ("float32", ("batch", "length", 100)), "b": ("float32", ("batch", "length", 100)),
        "out": ("float32", ("batch", 10)),
    }  # fmt: skip
    tensors = {n: TensorSpec(name=n, dtype=dtype, shape=shape) for n, (dtype, shape) in specs.items()}
    shards = (
        shard_of("embed", [MB], takes=("ids",), makes=("a",)),
        shard_of("block", [MB], takes=("a", "mask"), makes=("b",)),
        shard_of("top", [MB], takes=("b", "mask"), makes=("out",)),
    )
    return replace(
        manifest_of([1]), inputs=(tensors["ids"], tensors["mask"]), outputs=(tensors["out"],),
        edges=(tensors["a"], tensors["b"]), shards=shards, dims=("batch", "length"),
        structures={"s": Structure(activations=((ByteTerm(nbytes=1200, dims=("batch", "length")),),))},
    )  # fmt: skip


def test_a_pass_needs_edges_and_activations_of_its_worst_shard() -> None:
    need = pass_bytes(_model(), {"batch": 100, "length": 1000})
    # Input edge of 40 MB and activations of 120 MB, outputs included.
    assert 160 * MB <= need <= 400 * MB


def test_the_callers_arrays_are_counted() -> None:
    image = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 1000, 1000))
    model = replace(_model(), inputs=(*_model().inputs, image))
    dims = {"batch": 10, "length": 1}
    assert pass_bytes(model, dims) - pass_bytes(_model(), dims) >= 120 * MB


def test_a_pass_needs_more_for_larger_inputs() -> None:
    needs = [pass_bytes(_model(), {"batch": 8, "length": length}) for length in range(0, 5000, 100)]
    assert needs == sorted(needs)


def test_planning_assumes_one_row_of_128() -> None:
    assert planning_dims(_model()) == {"batch": 1, "length": 128}
    assert planning_dims(_model(), {"length": 512}) == {"batch": 1, "length": 512}


def _decoder() -> Manifest:
    base = _model()
    past = TensorSpec(name="past", dtype="float32", shape=("batch", 4, "past_length", 16))
    present = replace(past, name="present", shape=("batch", 4, "past_length + length", 16))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "length", 50_000))
    mask = replace(base.inputs[1], shape=("batch", "past_length + length"))
    hidden = replace(base.edges[0], name="hidden")
    shards = (
        base.shards[0],
        shard_of("block", [MB], takes=("a", "mask", "past"), makes=("hidden", "present")),
        shard_of("head.0", [MB], takes=("hidden",), makes=("logits.0",)),
    )
    return replace(
        base, inputs=(base.inputs[0], mask, past), outputs=(logits, present), edges=(base.edges[0], hidden),
        shards=shards, dims=("batch", "length", "past_length"), caches=(Cache(input="past", output="present"),),
        head=Head(input="hidden", output="logits", shards=("head.0",)),
    )  # fmt: skip


def test_planning_assumes_empty_caches() -> None:
    assert planning_dims(_decoder()) == {"batch": 1, "length": 128, "past_length": 0}


def test_caches_are_counted_by_their_length_after_the_pass() -> None:
    one = 2 * 4 * 16 * 4 * 11
    need = cache_bytes(_decoder(), {"batch": 2, "length": 1, "past_length": 10})
    assert one <= need <= 4 * one
    assert cache_bytes(_model(), {"batch": 2, "length": 1}) == 0


def test_a_head_for_the_last_position_needs_less_than_one_for_all() -> None:
    dims = {"batch": 1, "length": 1000, "past_length": 0}
    every, last = pass_bytes(_decoder(), dims), pass_bytes(_decoder(), dims, positions=1)
    assert every - last >= 190 * MB


def test_bytes_of_a_tensor_whose_shape_is_not_known_count_nothing() -> None:
    spec = TensorSpec(name="x", dtype="float16", shape=("batch", 10))
    assert tensor_bytes(spec, {"batch": 3}) == 60
    assert tensor_bytes(spec, {}) == 0
    assert tensor_bytes(replace(spec, shape=()), {}) == 0


def test_without_a_cut_head_the_logits_of_all_positions_are_made() -> None:
    whole = replace(_decoder(), head=None)
    dims = {"batch": 1, "length": 1000, "past_length": 0}
    assert pass_bytes(whole, dims, positions=1) == pass_bytes(whole, dims, positions=1000)
