"""Pictures that are small as files and enormous in memory, or no pictures at all.

The attacker is a client who sends a picture, or gives one to the user of the command line. He wants memory that no plan
counts, or another program started on his file.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import PIL.Image
from tests.attacks.attack import HELD, SucceededError, attack, in_child, refused, run_module

from pipeload.errors import ConfigError
from pipeload.serve.errors import ApiError
from pipeload.serve.images import image_bytes
from pipeload.tasks.images import _upright_rgb


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _as(kind: str, size: tuple[int, int]) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("L" if kind != "WEBP" else "RGB", size).save(made, kind)
    return made.getvalue()


def _files() -> dict[str, bytes]:
    large = (9000, 9000)
    gif = bytearray(_as("GIF", (8, 8)))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return {
        "a PNG of 2^31 by 2^31": _png(2**31 - 1, 2**31 - 1),
        "a PNG of 60,000 by 60,000": _png(60_000, 60_000, zlib.compress(bytes(1 << 20), 9)),
        "a PNG of 9,000 by 9,000": _as("PNG", large),
        "a WebP": _as("WEBP", (16_000, 5_000)),
        "a GIF with one frame and a screen of 65,535": bytes(gif),
        "a BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    }


@attack
def pictures_of_clients(_folder: Path) -> str:
    """Heads that claim billions of pixels, and files of kilobytes that are hundreds of megabytes: not decoded."""
    outcome = HELD
    for data in _files().values():
        coded = base64.b64encode(data).decode()
        outcome = refused(lambda coded=coded: image_bytes(coded), (ApiError, ConfigError))
    for text in ("http://evil.example/x.png", "file:///etc/passwd", "data:text/html;base64,AAAA", "/etc/passwd"):
        refused(lambda text=text: image_bytes(text), (ApiError, ConfigError))
    return outcome


@attack
def pictures_of_the_command_line(folder: Path) -> str:
    """The same pictures, and a TIFF, as files that the user classifies, within a gigabyte."""
    tiff = io.BytesIO()
    PIL.Image.new("1", (40_000, 40_000)).save(tiff, "TIFF", compression="group4")
    for number, data in enumerate([*_files().values(), tiff.getvalue()]):
        (folder / str(number)).write_bytes(data)
    code = """
import sys
from pathlib import Path
from pipeload.errors import ConfigError
from pipeload.tasks.images import _upright_rgb
for path in Path(sys.argv[1]).iterdir():
    try:
        _upright_rgb(path)
        print("took", path.name)
    except ConfigError as error:
        print(error)
"""
    told = in_child(code, folder, memory_bytes=1 << 30)
    if "took" in told or len(told.splitlines()) != 7:
        raise SucceededError(told)
    return f"refused: {told.splitlines()[0]}"


@attack
def programs_that_draw(folder: Path) -> str:
    """An EPS file, for which Pillow starts Ghostscript, and other formats that no camera and no page has."""
    (folder / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch evil) (w) file\n%%EOF\n"
    )
    return refused(lambda: _upright_rgb(folder / "x.png"), ConfigError, "cannot be read")


if __name__ == "__main__":
    run_module(Path(__file__).stem)
