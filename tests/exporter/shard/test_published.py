"""Sizes come from the files in every form in which publishers write them; what is no size is left out."""

from __future__ import annotations

from typing import Any

import pytest

from pipeload_export.shard.published import read_published


@pytest.mark.parametrize(
    ("config", "processor", "images"),
    [
        ({"image_size": 518}, {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, [224, 518]),
        ({"image_size": 224}, {"size": 224, "do_center_crop": False, "crop_size": 200}, [224]),
        ({"vision_config": {"image_size": 64}}, {}, [64]),
        ({"image_size": {"height": 32, "width": 32}}, {}, [32]),
        ({"image_size": None, "vision_config": None}, {"size": {"longest_edge": 30}}, []),
        ({"image_size": "large"}, {"crop_size": True, "size": [0, 3]}, []),
        ({"image_size": [16]}, {"size": {"shortest_edge": 48}}, [48, 16]),
    ],
)
def test_sizes_of_images(config: dict[str, Any], processor: dict[str, Any], images: list[int]) -> None:
    assert [height for height, _ in read_published(config, processor).images] == images


def test_height_comes_before_width() -> None:
    assert read_published({"image_size": [512, 864]}, {}).images == ((512, 864),)


@pytest.mark.parametrize(("config", "channels"), [({"num_channels": 1}, 1), ({}, None), ({"num_channels": "x"}, None)])
def test_channels(config: dict[str, Any], channels: int | None) -> None:
    assert read_published(config, {}).channels == channels
