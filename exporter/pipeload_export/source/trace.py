"""A model of transformers -> an ONNX graph, by the library that runs on the installed transformers (docs/adr/0013)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeload_export.extra import has_optimum
from pipeload_export.source import by_optimum, by_torch
from pipeload_export.source.refused import Refused, reason

__all__ = ["LEAST_DISK_BYTES", "check_supported", "trace"]

LEAST_DISK_BYTES = 1 << 20
"""With less than this the disk is full, whatever a library calls that."""


def check_supported(model_type: str, task: str) -> None:
    """Refuse what cannot be traced, as far as that is known before any weights are read: of torch's exporter, nothing.

    Args:
        model_type: the name that config.json has.
        task: one of `TASKS`, with `-with-past` for a decoder.

    Raises:
        Refused: the library does not export such a model for that task.
    """
    if has_optimum():
        by_optimum.check_supported(model_type, task)


def trace(model: Any, folder: Path, *, task: str, opset: int | None) -> None:
    """Write the model's graph and configs into the folder.

    Args:
        model: of transformers; it may be changed.
        folder: an existing folder.
        task: one of `TASKS`, with `-with-past` for a decoder.
        opset: version of the ONNX operators; None for the library's choice.

    Raises:
        Refused: the library cannot follow the model's code.
    """
    who, way = ("optimum", by_optimum) if has_optimum() else ("torch's exporter", by_torch)
    try:
        way.trace(model, folder, task=task, opset=opset)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if shutil.disk_usage(folder.parent).free < LEAST_DISK_BYTES:
            raise
        raise Refused(
            f"{who} cannot trace this model of type '{model.config.model_type}'. With the trial inputs that it gets "
            f"for the type, the model's code fails: {reason(error)}. Export the model to one .onnx file yourself, and "
            "pass that."
        ) from error
