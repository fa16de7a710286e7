"""The image processor of a checkpoint, as transformers makes it of preprocessor_config.json and its class's defaults.

What is exported has every setting, and the engine's own code must make the same pixel values of images of all kinds,
or the export is refused. A kind of processor that the engine does not have is left alone: the engine names it when it
gets an image, and takes pixel values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeload.errors import ConfigError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.tasks.images import ImageProcessor
from pipeload.tasks.model_files import read_config
from pipeload_export.source.bare import files_only
from pipeload_export.source.refused import Refused
from pipeload_export.source.tracing import RESOLVED

__all__ = ["resolve_image_processor"]

_NAME = "preprocessor_config.json"
_LIMIT = 1e-5
_SIZES = ((48, 64), (64, 48), (1, 1), (2, 3), (20, 400), (517, 33))
_MODES = ("RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16")
_UPSIDE_DOWN, _SIDEWAYS = 3, 6
_ORIENTATION = 0x0112


def resolve_image_processor(checkpoint: Path, graph_folder: Path) -> None:
    """Write the resolved preprocessor_config.json of a model of images into `graph_folder / RESOLVED`.

    Raises:
        Refused: transformers cannot open it, or the engine would make other pixel values of an image.
    """
    if not (checkpoint / _NAME).is_file():
        return
    from transformers import AutoImageProcessor

    with foreign_errors(
        Refused,
        f"transformers cannot open its {_NAME}",
        "Fetch it again, or take it out of the folder to export a model that takes pixel values only.",
    ):
        reference = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False, local_files_only=True)
    folder = graph_folder / RESOLVED
    folder.mkdir(exist_ok=True)
    (folder / _NAME).write_text(reference.to_json_string(), "utf-8")
    try:
        own = ImageProcessor(files_only(folder).files, read_config(files_only(checkpoint).files))
    except (ConfigError, ShardError):
        return  # the engine says so when it gets an image
    _compare(own, reference)


def _compare(own: ImageProcessor, reference: Any) -> None:
    from transformers.image_utils import load_image

    for name, data in _images():
        # Said, because transformers takes an image of one row for one with its channels first.
        options = {"return_tensors": "np", "input_data_format": "channels_last"}
        expected = np.asarray(reference(load_image(_opened(data)), **options)["pixel_values"])
        found = own.batch([data])
        if expected.shape != found.shape:
            difference = f"the shape {list(found.shape)} instead of {list(expected.shape)}"
        elif not (worst := float(np.abs(expected - found).max())) <= _LIMIT:
            difference = f"values that differ by up to {worst:.3g}"
        else:
            continue
        raise Refused(
            f"pipeload would make other pixel values of {name} than {type(reference).__name__} of transformers: "
            f"{difference}. Please report the model, and take {_NAME} out of the folder to export a model that takes "
            "pixel values only."
        )


def _opened(data: bytes) -> Any:
    import PIL.Image

    return PIL.Image.open(io.BytesIO(data))


def _images() -> Iterator[tuple[str, bytes]]:
    """Seeded noise in all sizes, modes and orientations, and an animation, as files."""
    import PIL.Image

    random = np.random.default_rng(0)
    for height, width in _SIZES:
        yield f"an image of {width} x {height}", _file(_noise(random, height, width))
    picture = _noise(random, 48, 64)
    for mode in _MODES:
        if mode == "I;16":
            deep = random.integers(0, 1 << 16, (48, 64), dtype=np.uint16)
            yield "an image of 16-bit grey", _file(PIL.Image.fromarray(deep))
        else:
            yield f"an image of mode {mode}", _file(picture.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    for orientation in (_UPSIDE_DOWN, _SIDEWAYS):
        exif = PIL.Image.Exif()
        exif[_ORIENTATION] = orientation
        yield f"an image with the EXIF orientation {orientation}", _file(picture, exif=exif)
    frames = [_noise(random, 48, 64) for _ in range(3)]
    yield "an animated image", _file(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _noise(random: np.random.Generator, height: int, width: int) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _file(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
