"""Sizes that make whole patches and frames follow from the graph's convolutions."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import NodeProto, helper

from pipeload.format.manifest import TensorSpec
from pipeload_export.shard.extents import Extent, find_extents


def _conv(
    given: str, made: str, kernel: int, stride: int, pad: int = 0, rank: int = 2, kind: str = "Conv"
) -> NodeProto:
    options: dict[str, Any] = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "pads": [pad] * 2 * rank}
    return helper.make_node(kind, [given, "weight"], [made], **options)


PIXELS = TensorSpec(name="pixels", dtype="float32", shape=("batch", "channels", "height", "width"))
SOUND = TensorSpec(name="sound", dtype="float32", shape=("batch", "samples"))


def _found(nodes: list[NodeProto], spec: TensorSpec) -> dict[int, Extent]:
    return {axis: extent for (_, axis), extent in find_extents(nodes, [spec], lambda _: None).items()}


def test_patches_are_the_steps_of_an_image() -> None:
    assert _found([_conv("pixels", "y", 14, 14)], PIXELS) == {2: Extent(14, 0), 3: Extent(14, 0)}


def test_strides_of_convolutions_and_pools_multiply() -> None:
    nodes = [_conv("pixels", "a", 7, 2, 3), _conv("a", "b", 3, 2, 1, kind="MaxPool"), _conv("b", "c", 3, 2, 1)]
    assert _found(nodes, PIXELS)[2].step == 8


def test_frames_of_a_sound_need_all_that_their_kernels_reach() -> None:
    nodes = [helper.make_node("Unsqueeze", ["sound", "axis"], ["x0"])]
    layers = [(10, 5), *[(3, 2)] * 4, (2, 2), (2, 2)]
    nodes += [_conv(f"x{i}", f"x{i + 1}", kernel, stride, rank=1) for i, (kernel, stride) in enumerate(layers)]
    (extent,) = _found(nodes, SOUND).values()
    assert extent.step == 320
    assert extent.size(1) == 400
    size = extent.size(25)
    for kernel, stride in layers:
        size = (size - kernel) // stride + 1
    assert size == 25


def test_attention_over_fewer_keys_does_not_shrink_the_queries() -> None:
    nodes = [
        _conv("pixels", "patches", 4, 4),
        _conv("patches", "keys", 8, 8),
        helper.make_node("MatMul", ["patches", "keys"], ["state"]),
        _conv("state", "y", 2, 2),
    ]
    assert _found(nodes, PIXELS)[2].step == 32


def test_arithmetic_on_shapes_is_no_way_of_an_image() -> None:
    nodes = [
        _conv("pixels", "patches", 4, 4),
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Reshape", ["patches", "shape"], ["state"]),
        _conv("state", "y", 2, 2),
    ]
    assert _found(nodes, PIXELS)[2].step == 8


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_ids_have_no_extents(dtype: str) -> None:
    ids = TensorSpec(name="pixels", dtype=dtype, shape=PIXELS.shape)
    assert not _found([_conv("pixels", "y", 14, 14)], ids)


def test_a_pool_over_all_that_is_left_asks_for_no_size() -> None:
    """EfficientNet's has a window of 1280 x 1280 and rounds up: images of 41,779 pixels were tried."""
    last = helper.make_node("AveragePool", ["a"], ["b"], kernel_shape=[1280] * 2, strides=[1280] * 2, ceil_mode=1)
    assert _found([_conv("pixels", "a", 16, 16), last], PIXELS)[2] == Extent(16, 0)
    small = helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    assert _found([_conv("pixels", "a", 16, 16), small], PIXELS)[2].step == 32
