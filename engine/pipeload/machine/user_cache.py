"""The user's cache, where pipeload keeps its findings about this machine and the models on it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pipeload.machine.files import replace_file

__all__ = ["keep_file", "user_cache"]


def user_cache(name: str) -> Path | None:
    """`${PIPELOAD_CACHE}/name`, else `${XDG_CACHE_HOME:-~/.cache}/pipeload/name`; nothing is made there.

    Returns:
        None for a user without a home, as in many containers: then nothing is kept.
    """
    own, base = (os.environ.get(variable, "") for variable in ("PIPELOAD_CACHE", "XDG_CACHE_HOME"))
    # The XDG rules say that a relative path is to be ignored.
    if own.startswith("/"):
        return Path(own) / name
    try:
        return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "pipeload" / name
    except (RuntimeError, KeyError):
        # Where HOME is not set, Python asks the user database, which may lack a container's user.
        return None


def keep_file(path: Path, data: bytes) -> None:
    """Write a file of the cache whole or not at all; a cache that cannot be written is no fault."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
