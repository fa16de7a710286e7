"""A model of transformers -> an ONNX graph, by optimum, which traces it with trial inputs of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeload_export.source.refused import Refused, reason

__all__ = ["LEAST_DISK_BYTES", "trace"]

LEAST_DISK_BYTES = 1 << 20
"""With less than this the disk is full, whatever a library calls that."""


class _LastOrNone(list[Any]):
    """A checkpoint's preprocessors. optimum asks for the last, and expects None where there is none."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(place) if self else None


def trace(model: Any, folder: Path, *, task: str, opset: int | None) -> None:
    """Write the model's graph and configs into the folder.

    Raises:
        Refused: the model's code does not take optimum's trial inputs.
    """
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.utils import save_utils

    load = save_utils.maybe_load_preprocessors
    save_utils.maybe_load_preprocessors = lambda *args, **options: _LastOrNone(load(*args, **options))
    try:
        onnx_export_from_model(model, output=folder, task=task, opset=opset, do_validation=False)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if shutil.disk_usage(folder.parent).free < LEAST_DISK_BYTES:
            raise
        raise Refused(
            f"optimum cannot trace this model of type '{model.config.model_type}'. With the trial inputs that it makes "
            f"for the type, the model's code fails: {reason(error)}. Export the model to one .onnx file yourself, and "
            "pass that."
        ) from error
    finally:
        save_utils.maybe_load_preprocessors = load
