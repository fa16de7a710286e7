"""Images, as the library and as the server take them, against Pillow by itself."""

from __future__ import annotations

import base64
import io
import warnings
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from tests.fuzz.mutations import damaged
from tests.fuzz.target import Target, Trial, Wrong
from tests.fuzz.targets.settings import InMemory

from pipeload.errors import ConfigError
from pipeload.serve.errors import ApiError
from pipeload.serve.images import image_bytes
from pipeload.tasks.images import ImageProcessor
from pipeload.tasks.model_files import ModelConfig

_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI", "QOI")
_SIZES = (0, 1, 7, 8, 255, 256, 4096, 9999, 20_000, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)


def _seeds() -> list[bytes]:
    """A small image of each format and mode."""
    pixels = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)
    made = []
    for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"):
        image = PIL.Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = image.convert(mode)
        for name in _FORMATS:
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            file = io.BytesIO()
            try:
                image.save(file, name, exif=exif.tobytes())
            except (OSError, KeyError, ValueError, TypeError):
                continue
            made.append(file.getvalue())
    return made


def _mutate(chance: Random, pool: Any) -> bytes:
    """Damaged bytes; some are sizes in the head."""
    data = chance.choice(pool)
    if chance.random() < 0.6:
        return damaged(chance, data, pool)
    made = bytearray(data)
    for _ in range(chance.choice((1, 2))):
        at = int(chance.random() * min(len(made), 64))
        size = chance.choice((2, 4))
        made[at : at + size] = (chance.choice(_SIZES) % (1 << 8 * size)).to_bytes(
            size, chance.choice(("little", "big"))
        )
    return bytes(made)


def _prepare() -> Trial:
    warnings.simplefilter("error")
    settings = b'{"size":{"height":8,"width":8},"resample":2}'
    processor = ImageProcessor(InMemory({"preprocessor_config.json": settings}), ModelConfig())

    def trial(data: bytes) -> bool:
        try:
            image_bytes(base64.b64encode(data).decode())
        except ApiError as error:
            if error.status >= 500:
                raise Wrong("the server calls an image its own fault", error) from error
        except ConfigError:
            pass
        values = processor.batch([data])[0]
        with PIL.Image.open(io.BytesIO(data)) as opened:
            picture = PIL.ImageOps.exif_transpose(opened).convert("RGB").resize((8, 8), PIL.Image.Resampling.BILINEAR)
        wanted = (np.asarray(picture) * (1 / 255)).astype(np.float32)
        if not np.allclose(values, ((wanted - 0.5) / 0.5).transpose(2, 0, 1), atol=1e-6):
            raise Wrong("pixel values are not Pillow's")
        return True

    return trial


TARGETS = (
    Target(
        name="image", what="images, by Pillow", prepare=_prepare, mutate=_mutate, seeds=_seeds, native=True, share=1.5,
        memory_bytes=1 << 30, limit_s=20,
    ),
)  # fmt: skip
