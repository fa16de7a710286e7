"""The files beside an ONNX graph that hold its weights, and those with the settings of a checkpoint: bounded to their
own folder before any is read.

The hub's cache has links there: `snapshots/COMMIT/model.onnx_data -> ../../blobs/SHA256`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeload.errors import ExportError

__all__ = ["check_links", "external_files"]

_SETTINGS = (".codes", ".jinja", ".json", ".model", ".py", ".spm", ".txt")
"""Ends of names of files that an export copies, or makes other files of; weights may lie elsewhere."""


def check_links(paths: Iterable[Path], folder: Path, source: str) -> None:
    """Look where the settings, vocabularies and templates of a model lie: an export would copy what they lead to.

    Args:
        paths: files of the folder, or in folders of it; others than settings are not looked at.
        folder: the model's, which may be one of the hub's cache.
        source: what the user named.

    Raises:
        ExportError: a symbolic link leads out of the folder.
    """
    for path in paths:
        location = path.relative_to(folder).as_posix()
        try:
            inside = not path.name.endswith(_SETTINGS) or _is_inside(folder, location, path.resolve())
        except (OSError, RuntimeError) as error:
            raise ExportError(f"'{source}' has the file '{location}', which is no path: {error}.") from error
        if not inside:
            raise ExportError(
                f"'{source}' has the file '{location}', which leads to {path.resolve()}, outside of its own folder. "
                "Put a copy in its place if it belongs to the model."
            )


def external_files(model: Any, path: Path, source: str) -> tuple[Path, ...]:
    """The files with external data of a parsed ONNX model.

    Every tensor counts: initializers, sparse ones, constants and other attributes of nodes, subgraphs, functions.

    Args:
        model: the `ModelProto`.
        path: its file.
        source: what the user named.

    Raises:
        ExportError: a file is missing, too short or outside of the folder, or a place in it is no number.
    """
    import onnx

    ends: dict[str, int] = {}
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        places = [entries.get(key) or "0" for key in ("offset", "length")]
        if not all(place.isascii() and place.isdigit() for place in places):
            raise ExportError(
                f"'{source}' has the tensor '{tensor.name}' at no possible place of '{location}': offset and length "
                f"are {' and '.join(places)}. Fetch or export it again."
            )
        ends[location] = max(sum(map(int, places)), ends.get(location, 0))
    for location, end in ends.items():
        try:
            data = (path.parent / location).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ExportError(f"'{source}' has weights at {location!r}, which is no path: {error}.") from error
        if not _is_inside(path.parent, location, data):
            raise ExportError(f"'{source}' has weights at '{location}', outside of its own folder. Move them into it.")
        size = data.stat().st_size if data.is_file() else -1
        if size < end:
            fact = "is missing" if size < 0 else f"has {size} of {end} bytes"
            raise ExportError(f"'{source}' has its weights in '{location}', which {fact}. Copy it again.")
    return tuple(path.parent / location for location in ends)


def _is_inside(folder: Path, location: str, data: Path) -> bool:
    if folder.resolve() in data.parents:
        return True
    blobs = (parent.with_name("blobs").resolve() for parent in folder.absolute().parents if parent.name == "snapshots")
    below = not Path(location).is_absolute() and not os.path.normpath(location).startswith("..")
    return below and data.parent in blobs


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All messages of that kind in a message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if isinstance(part, kind):
                yield part
            else:
                yield from _tensors(part, kind)
