"""Images in requests: only as bytes, and measured before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re

from pipeload.errors import ConfigError
from pipeload.foreign import foreign_errors
from pipeload.machine.sizes import format_bytes
from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS

__all__ = ["image_bytes"]

_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def image_bytes(text: str) -> bytes:
    """The file of an image that a request holds as base64 or as a `data:` URL.

    Raises:
        ApiError: it is an address, no base64, no image of a known format, or too large.
        ConfigError: Pillow is not installed.
    """
    found = _DATA.match(text)
    if found is None and ":" in text[:40]:
        raise ApiError(400, f"An image is '{text[:40]}...'. This server fetches nothing: send base64.", param="input")
    coded = text[found.end() :] if found else text
    if len(coded) * 3 // 4 > LIMITS.image_bytes:
        raise ApiError(413, f"An image has more than {format_bytes(LIMITS.image_bytes)}.", code="too_large")
    try:
        data = base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"An image is no base64: {error}.", param="input") from error
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError("Images need Pillow: pip install pillow.") from error
    # Reads the head only.
    with foreign_errors(ConfigError, "An image cannot be read", f"Send {', '.join(_FORMATS)}."):
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    if width * height > LIMITS.image_pixels:
        raise ApiError(
            413, f"An image has {width} x {height} pixels; this server takes {LIMITS.image_pixels}.", code="too_large"
        )
    return data
