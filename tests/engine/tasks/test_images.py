from __future__ import annotations

import io
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import ToyRunner, files_in, manifest, write_json

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.images import ImageProcessor
from pipeload.tasks.model_files import ModelConfig

PillowImage = pytest.importorskip("PIL.Image")


def _pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth colours with some noise, so that resampling filters differ."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 190, height)[:, None, None] * np.linspace(1, 0.2, width)[None, :, None]
    return (ramp + noise).astype(np.uint8)


def _processor(directory: Path, file: dict[str, object] | None = None, **config: Any) -> ImageProcessor:
    if file is not None:
        write_json(directory, "preprocessor_config.json", file)
    return ImageProcessor(files_in(directory), ModelConfig(**config))


IMAGES = [_pixels(50, 70), _pixels(301, 200, 1), _pixels(20, 20, 2), _pixels(7, 400, 3)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTImageProcessor", {}),
        (
            "ViTImageProcessor",
            {"size": {"height": 40, "width": 56}, "resample": 3, "image_mean": 0.4, "image_std": 0.2},
        ),
        ("ViTImageProcessor", {"size": 48, "resample": 1, "rescale_factor": 1 / 127.5}),
        ("ViTImageProcessor", {"do_rescale": False}),
        ("ViTImageProcessor", {"do_normalize": False, "resample": 0}),
        ("DeiTImageProcessor", {}),
        ("DeiTImageProcessor", {"size": {"height": 60, "width": 90}, "crop_size": {"height": 33, "width": 64}}),
        ("DeiTImageProcessor", {"size": 30, "crop_size": 45}),
        ("DeiTImageProcessor", {"size": 31, "crop_size": {"height": 20, "width": 44}, "do_normalize": False}),
        ("DeiTImageProcessor", {"do_center_crop": False, "image_mean": [0.485, 0.456, 0.406]}),
        ("DeiTImageProcessor", {"do_resize": False}),
        ("CLIPImageProcessor", {}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": 31}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}),
    ],
)
def test_pixel_values_equal_those_of_transformers(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, kind)(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor(files_in(tmp_path), ModelConfig())
    for image in IMAGES:
        expected = theirs(PillowImage.fromarray(image), return_tensors="np", input_data_format="channels_last")
        actual = ours.batch([image])
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop", [{}, {"do_center_crop": True, "crop_size": 1001}])
def test_a_pixel_takes_thirty_one_bytes_on_the_way_to_its_values(tmp_path: Path, crop: dict[str, Any]) -> None:
    """Four of them are Pillow's, which are not traced; a crop has a copy of the array, of 3 bytes."""
    processor = _processor(tmp_path, {"size": 1000, **crop})
    processor.batch([IMAGES[0]])
    tracemalloc.start()
    try:
        values = processor.batch([IMAGES[0]])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (27.5 if not crop else 30.5) * values.size / 3


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "DeiTImageProcessor", "CLIPImageProcessor"])
def test_an_empty_file_means_the_defaults_of_its_class(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = _processor(tmp_path, {"image_processor_type": kind})
    expected = getattr(transformers, kind)()(PillowImage.fromarray(IMAGES[0]), return_tensors="np")
    np.testing.assert_allclose(ours.batch([IMAGES[0]]), expected["pixel_values"], rtol=0, atol=1e-6)


def test_old_files_name_a_feature_extractor_or_nothing(tmp_path: Path) -> None:
    named = _processor(tmp_path, {"feature_extractor_type": "DeiTFeatureExtractor", "size": 64}).batch([IMAGES[0]])
    plain = _processor(tmp_path, {"size": 64}, model_type="deit").batch([IMAGES[0]])
    np.testing.assert_array_equal(named, plain)
    assert named.shape == (1, 3, 224, 224)
    assert _processor(tmp_path, {"size": 64}, model_type="vit").batch([IMAGES[0]]).shape == (1, 3, 64, 64)


def test_without_a_file_an_image_takes_the_size_of_the_model(tmp_path: Path) -> None:
    values = _processor(tmp_path, image_size=32, model_type="vit").batch([IMAGES[0], IMAGES[1]])
    assert values.shape == (2, 3, 32, 32)
    assert -1 <= values.min() < -0.5 < 0.3 < values.max() <= 1
    assert _processor(tmp_path, image_size=[24, 48]).batch([IMAGES[0]]).shape == (1, 3, 24, 48)
    assert _processor(tmp_path).batch([IMAGES[0]]).shape == (1, 3, 224, 224)


def test_an_image_may_be_a_path_bytes_pillow_or_an_array(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    PillowImage.fromarray(IMAGES[0]).save(path)
    with PillowImage.open(path) as opened:
        values = _processor(tmp_path).batch([path, str(path), path.read_bytes(), opened, IMAGES[0]])
    assert (values == values[0]).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = PillowImage.fromarray(IMAGES[0]).convert(mode)
    expected = _processor(tmp_path).batch([image.convert("RGB")])
    np.testing.assert_array_equal(_processor(tmp_path).batch([image]), expected)


def test_an_image_is_turned_upright_and_left_as_it_was(tmp_path: Path) -> None:
    image = PillowImage.fromarray(IMAGES[0])
    exif = image.getexif()
    exif[0x0112] = 6
    data = io.BytesIO()
    image.save(data, "png", exif=exif)
    values = _processor(tmp_path).batch([data.getvalue(), np.rot90(IMAGES[0], -1).copy()])
    np.testing.assert_array_equal(values[0], values[1])
    with PillowImage.open(data) as opened:
        _processor(tmp_path).batch([opened])
        assert opened.size == (70, 50)


def test_images_of_different_sizes_need_a_common_size(tmp_path: Path) -> None:
    processor = _processor(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}})
    assert processor.batch([IMAGES[0]]).shape == (1, 3, 32, 44)
    with pytest.raises(ConfigError, match="different sizes after preprocessing"):
        processor.batch([IMAGES[0], IMAGES[1]])


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(tmp_path: Path, array: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be uint8 \[height, width, 3\]"):
        _processor(tmp_path).batch([array])


def test_other_things_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    PillowImage.fromarray(IMAGES[0]).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    images: list[tuple[Any, str]] = [
        (3, "not int"),
        (tmp_path / "missing.png", r"missing\.png cannot be read"),
        (tmp_path, "cannot be read"),
        (broken, r"broken\.png cannot be read"),
        (b"no image", "The image cannot be read"),
        (b"", "The image cannot be read"),
    ]
    for image, message in images:
        with pytest.raises(ConfigError, match=message):
            _processor(tmp_path).batch([image])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "prepared by 'ConvNextImageProcessor'"),
        ({"size": {"longest_edge": 3}}, "a size that pipeload does not know"),
        ({"size": [1, 2, 3]}, "a size that pipeload does not know"),
        ({"size": {"height": 0, "width": 3}}, "the impossible size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "a crop_size that pipeload does not know"),
        ({"resample": 17}, "unknown resampling filter 17"),
        ({"image_mean": [0.5]}, "1 means or deviations for 3 channels"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(tmp_path: Path, file: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _processor(tmp_path, file)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"preprocessor_config\.json is damaged"):
        _processor(tmp_path, {"size": "large"})


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match="pip install pillow"):
        _processor(tmp_path).batch([IMAGES[0]])


def test_images_are_classified_in_their_order(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"id2label": {"0": "dark", "1": "bright"}, "image_size": 8})
    runner = ToyRunner(
        tmp_path,
        manifest("image-classification", ("pixel_values",), dtype="float32"),
        lambda inputs: {"logits": np.stack([-inputs["pixel_values"].mean((1, 2, 3))] * 2, 1) * [1, -1]},
    )
    dark, bright = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    results = classify(runner, [dark, bright, dark], batch_size=2, top_k=1)
    assert [labels[0].label for labels in results] == ["dark", "bright", "dark"]
    assert classify(runner, bright, top_k=1) == results[1]
    assert [call["pixel_values"].shape for call in runner.calls][:2] == [(2, 3, 8, 8), (1, 3, 8, 8)]
