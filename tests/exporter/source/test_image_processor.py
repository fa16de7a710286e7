"""The exported image processor has every setting of transformers' own; the engine makes its pixel values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.exporter.models import write_json

from pipeload.tasks.images import ImageProcessor
from pipeload_export.source import image_processor
from pipeload_export.source.image_processor import resolve_image_processor
from pipeload_export.source.refused import Refused
from pipeload_export.source.tracing import RESOLVED

KINDS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor"},
    "vit-old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2},
    "vit-fast": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 40}, "resample": 3},
    "vit-plain": {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "do_resize": False},
    "vit-scale": {"image_processor_type": "ViTImageProcessor", "rescale_factor": 0.5, "image_mean": [0, 1, 2]},
    "deit": {"image_processor_type": "DeiTImageProcessor", "crop_size": 32, "size": 40},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
    "clip-default": {"image_processor_type": "CLIPImageProcessor"},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


def resolved(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / "config.json", {"model_type": "vit"})
    write_json(folder / "preprocessor_config.json", settings)
    (folder / "out").mkdir()
    resolve_image_processor(folder, folder / "out")
    found: dict[str, Any] = json.loads((folder / "out" / RESOLVED / "preprocessor_config.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_values_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    found = resolved(tmp_path, KINDS[kind])
    assert {"do_resize", "size", "resample", "do_rescale", "image_mean"} <= found.keys()


def test_other_pixel_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ImageProcessor.batch
    monkeypatch.setattr(image_processor.ImageProcessor, "batch", lambda self, images: batch(self, images) + 1e-3)
    with pytest.raises(
        Refused, match=r"other pixel values of an image of 64 x 48 .*ViTImageProcessor .*differ by up to 0\.001"
    ):
        resolved(tmp_path, KINDS["vit"])


def test_a_setting_that_transformers_ignores_and_the_engine_would_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the shape"):
        resolved(tmp_path, {"image_processor_type": "ViTImageProcessor", "do_center_crop": True, "crop_size": 32})


def test_a_kind_that_the_engine_lacks_is_left_to_it(tmp_path: Path) -> None:
    assert resolved(tmp_path, {"image_processor_type": "ConvNextImageProcessor"})["crop_pct"] is not None


def test_a_file_that_transformers_cannot_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"transformers cannot open its preprocessor_config\.json"):
        resolved(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": {"depth": 3}})


def test_all_kinds_of_images_are_compared() -> None:
    images = [image_processor._opened(data) for _, data in image_processor._images()]
    assert {image.mode for image in images} == {"RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16"}
    assert {image.getexif().get(0x0112) for image in images} == {None, 3, 6}
    assert (1, 1) in {image.size for image in images}
    assert max(getattr(image, "n_frames", 1) for image in images) > 1
    assert all(np.asarray(image).size for image in images)
