"""Where pipeload keeps what it found out about this machine and the models on it: in the user's cache."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["keep_file", "user_cache"]


def user_cache(name: str) -> Path:
    """`${PIPELOAD_CACHE}/name`, else `${XDG_CACHE_HOME:-~/.cache}/pipeload/name`; nothing is made there."""
    own, base = (os.environ.get(variable, "") for variable in ("PIPELOAD_CACHE", "XDG_CACHE_HOME"))
    # The XDG rules say that a relative path is to be ignored.
    folder = (
        Path(own)
        if own.startswith("/")
        else (Path(base) if base.startswith("/") else Path.home() / ".cache") / "pipeload"
    )
    return folder / name


def keep_file(path: Path, data: bytes) -> None:
    """Write a file of the cache whole or not at all; a cache that cannot be written is no fault."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staging = tempfile.mkstemp(dir=path.parent, prefix=".staging-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(staging).replace(path)
        except BaseException:
            Path(staging).unlink(missing_ok=True)
            raise
