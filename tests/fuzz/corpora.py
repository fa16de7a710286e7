"""Known inputs: those of the corpus, which reach different code, and those that broke a promise once.

Each is a file; the folders are `corpus/TARGET` and `found/TARGET`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["CORPUS", "FOUND", "keep", "known"]

CORPUS, FOUND = (Path(__file__).parent / name for name in ("corpus", "found"))


def known(folder: Path, name: str) -> list[bytes]:
    """The inputs for a target in a folder, in the order of their names."""
    return [path.read_bytes() for path in sorted((folder / name).glob("*")) if path.is_file()]


def keep(folder: Path, name: str, inputs: Iterable[bytes]) -> list[Path]:
    """Write inputs into a target's folder; returns their files."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    made = []
    for data in inputs:
        made.append(folder / name / hashlib.sha256(data).hexdigest()[:12])
        made[-1].write_bytes(data)
    return made
