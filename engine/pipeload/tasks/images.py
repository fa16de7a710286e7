"""Images to pixel values, with the model directory's `preprocessor_config.json`.

The semantics are those of transformers' processors that use Pillow (its "slow" ones) and of its pipelines: an
image is turned upright by its EXIF tag and made RGB, then

```
resize -> centre crop -> rescale -> normalise -> [3, height, width]
```

with every step as the file sets it. Without the file, an image goes through `ViTImageProcessor`'s defaults: resized
with bilinear filtering to the size in `config.json` (or 224), and scaled to -1 .. 1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, RunError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.model_files import ModelConfig, read_config, read_settings
from pipeload.tasks.runner import Runner, config_of, once_per_runner

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

__all__ = ["Image", "ImageProcessor", "image_processor_of", "image_sizes"]

Image: TypeAlias = "str | Path | bytes | NDArray[np.uint8] | PillowImage"
"""A path, the bytes of an image file, `[height, width, 3]` pixels, or an image opened by Pillow."""

_NAME = "preprocessor_config.json"

_Size = int | list[int] | dict[str, int]

_BILINEAR, _BICUBIC = 2, 3
_FILTERS = range(6)
"""Pillow's numbers of its resampling filters."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of image files. Pillow has others, for some of which it starts programs (EPS: Ghostscript)."""
_MOST_READ_PIXELS = 1 << 26
"""Of an image file; each takes 3 bytes."""
_MOST_PIXELS = 1 << 24
"""Of a prepared image; each takes up to 31 bytes on the way to its values: Pillow's 4, 3 of an array, twice the 12 of
its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """The defaults of a transformers class for settings that the file does not have."""

    size: _Size
    resample: int
    crop: bool
    number_is_shortest_edge: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


_VIT = _Family(size=224, resample=_BILINEAR, crop=False)
_DEIT = _Family(size=256, resample=_BICUBIC, crop=True)
_CLIP = _Family(
    size=224,
    resample=_BICUBIC,
    crop=True,
    number_is_shortest_edge=True,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_FAMILIES = {"ViT": _VIT, "DeiT": _DEIT, "CLIP": _CLIP, "Bit": _CLIP}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """`preprocessor_config.json`; null means the same as a missing field."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    size: _Size | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: _Size | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    do_normalize: bool | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None


class ImageProcessor:
    """The image preprocessing of one model. Safe to use from several threads."""

    def __init__(self, files: ModelFiles, config: ModelConfig) -> None:
        file = read_settings(files, _NAME, _File)
        family = _family(file, config)
        size = file.size
        if size is None and files.read(_NAME) is None:
            size = list(config.image_height_width or ()) or None
        self._resize = file.do_resize is not False
        self._size = _edges(size or family.size, family.number_is_shortest_edge)
        self._resample = family.resample if file.resample is None else file.resample
        if self._resample not in _FILTERS:
            raise ConfigError(f"preprocessor_config.json has the unknown resampling filter {self._resample}.")
        crop = family.crop if file.do_center_crop is None else file.do_center_crop
        self._crop = _height_width(file.crop_size or 224) if crop else None
        rescale = file.do_rescale is not False
        self._factor = (1 / 255 if file.rescale_factor is None else file.rescale_factor) if rescale else None
        self._mean = self._std = None
        if file.do_normalize is not False:
            self._mean = _per_channel(file.image_mean, family.mean)
            self._std = _per_channel(file.image_std, family.std)

    def batch(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """The pixel values of one or more images, `[len(images), 3, height, width]`.

        Raises:
            ConfigError: Pillow is not installed, an image cannot be read, or the images differ in size after
                preprocessing.
        """
        arrays = [self._one(image) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise ConfigError(
                "The images have different sizes after preprocessing, because preprocessor_config.json neither "
                "resizes to a fixed size nor crops. Pass them one at a time."
            )
        with foreign_errors(RunError, f"{len(arrays)} images make no batch", "Pass a smaller batch_size."):
            return np.stack(arrays)

    def _one(self, image: Image) -> NDArray[np.float32]:
        picture = _upright_rgb(image)
        with foreign_errors(
            ConfigError,
            f"An image of {picture.width} x {picture.height} cannot be prepared as preprocessor_config.json says",
            "Prepare it yourself and pass pixel_values to model.run.",
        ):
            return self._values(picture)

    def _values(self, picture: PillowImage) -> NDArray[np.float32]:
        if self._resize:
            height, width = _target(picture.height, picture.width, self._size)
            _check_pixels(height, width)
            picture = picture.resize((width, height), resample=self._resample)
        if self._crop:
            _check_pixels(*self._crop)
        pixels: NDArray[Any] = np.asarray(picture)
        if self._crop:
            pixels = _center_crop(pixels, self._crop)
        values = np.empty(pixels.shape, np.float32)
        # In double precision and then rounded, as transformers does; a piece at a time, which takes no memory.
        np.multiply(pixels, np.float64(1.0 if self._factor is None else self._factor), out=values, casting="same_kind")
        if self._mean is not None and self._std is not None:
            values -= self._mean
            values /= self._std
        return np.ascontiguousarray(values.transpose(2, 0, 1))


@once_per_runner
def image_processor_of(runner: Runner) -> ImageProcessor:
    """The model's image preprocessing. Raises ConfigError if pipeload does not support its kind."""
    return ImageProcessor(runner.files, config_of(runner))


def _family(file: _File, config: ModelConfig) -> _Family:
    name = file.image_processor_type or file.feature_extractor_type
    if name is None:
        return _DEIT if file != _File() and config.model_type == "deit" else _VIT
    for suffix in ("ImageProcessorFast", "ImageProcessor", "FeatureExtractor"):
        if (family := _FAMILIES.get(name.removesuffix(suffix))) is not None:
            return family
    raise ConfigError(
        f"The model wants its images prepared by '{name}'; pipeload has the image processors "
        f"{', '.join(_FAMILIES)}. Prepare them yourself and pass pixel_values to model.run."
    )


def _edges(size: _Size, number_is_shortest_edge: bool) -> tuple[int, int] | int:
    """(height, width), or the length of the shortest edge."""
    match size:
        case int():
            edges: tuple[int, int] | int = size if number_is_shortest_edge else (size, size)
        case [height, width] | {"height": height, "width": width}:
            edges = height, width
        case [edge] | {"shortest_edge": edge}:
            edges = edge
        case _:
            raise ConfigError(f"preprocessor_config.json has a size that pipeload does not know: {size}.")
    if min(edges if isinstance(edges, tuple) else (edges,)) < 1:
        raise ConfigError(f"preprocessor_config.json has the impossible size {size}.")
    return edges


def _height_width(size: _Size) -> tuple[int, int]:
    edges = _edges(size, number_is_shortest_edge=False)
    if isinstance(edges, int):
        raise ConfigError(f"preprocessor_config.json has a crop_size that pipeload does not know: {size}.")
    return edges


def _target(height: int, width: int, edges: tuple[int, int] | int) -> tuple[int, int]:
    """The height and width to which an image of this size is resized."""
    if isinstance(edges, tuple):
        return edges
    if width <= height:
        return int(edges * height / width), edges
    return edges, int(edges * width / height)


def _check_pixels(height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise ConfigError(
            f"preprocessor_config.json makes an image of {width} x {height} pixels, and pipeload prepares at most "
            f"{_MOST_PIXELS}. Make the image smaller or less narrow."
        )


def _center_crop(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The middle of `[height, width, 3]`; a smaller image is padded with zeros."""
    for axis, wanted in enumerate(size):
        actual = pixels.shape[axis]
        if actual < wanted:
            before = -(-(wanted - actual) // 2)
            widths = [(0, 0)] * pixels.ndim
            widths[axis] = (before, wanted - actual - before)
            pixels = np.pad(pixels, widths)
        else:
            begin = (actual - wanted) // 2
            pixels = pixels.take(range(begin, begin + wanted), axis)
    return pixels


def _per_channel(value: float | list[float] | None, default: tuple[float, ...]) -> NDArray[np.float32]:
    given = default if value is None else value
    array = np.asarray(given, np.float32)
    if array.shape not in ((), (3,)):
        raise ConfigError(f"preprocessor_config.json has {array.size} means or deviations for 3 channels.")
    return array


def _upright_rgb(image: Image) -> PillowImage:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ConfigError("Images need Pillow: pip install pillow.") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ConfigError(
                f"An image array must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}."
            )
        return PIL.Image.fromarray(image)
    if not isinstance(image, str | Path | bytes | PIL.Image.Image):
        raise ConfigError(f"An image must be a path, bytes, a Pillow image or an array, not {type(image).__name__}.")
    name = f"The image {image}" if isinstance(image, str | Path) else "The image"
    # Each of Pillow's format readers raises errors of its own for damaged files.
    with foreign_errors(ConfigError, f"{name} cannot be read", "Pass another, or save it anew as PNG or JPEG."):
        if isinstance(image, PIL.Image.Image):
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
        with PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_FORMATS) as opened:
            _check_size(opened.width, opened.height)
            # In place: a photo takes tens of megabytes, and so does each copy.
            opened.load()
            PIL.ImageOps.exif_transpose(opened, in_place=True)
            return opened if opened.mode == "RGB" else opened.convert("RGB")


def _check_size(width: int, height: int) -> None:
    """Of an image file, before it is decoded."""
    if width * height > _MOST_READ_PIXELS:
        raise ConfigError(
            f"An image has {width} x {height} pixels, and pipeload reads at most {_MOST_READ_PIXELS}. Make it smaller."
        )


def image_sizes(files: ModelFiles, manifest: Manifest) -> dict[str, int]:
    """Sizes of the symbols in `[batch, channels, height, width]` of a model that takes images, from `config.json`."""
    if len(manifest.inputs) != 1 or len(manifest.inputs[0].shape) != 4:
        return {}
    config = read_config(files)
    sizes = (config.num_channels or 3, *(config.image_height_width or (224, 224)))
    shape = manifest.inputs[0].shape[1:]
    return {dim: size for dim, size in zip(shape, sizes, strict=True) if isinstance(dim, str)}
