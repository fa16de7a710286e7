"""Files that appear whole or not at all."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, readable as any that this process makes; whatever goes wrong leaves what was there, and no rest.

    A device or a pipe, such as `/dev/stdout`, cannot be replaced: it is written to.

    Args:
        path: the file, in a folder that is there; an older one is replaced.
        data: all of it.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        staging = path.absolute().with_name(f".staging-{secrets.token_hex(8)}")
        try:
            staging.write_bytes(data)
            staging.replace(path)
        finally:
            with suppress(OSError):
                staging.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
