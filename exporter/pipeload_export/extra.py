"""Is the extra [export] installed? Asked before anything is fetched or written."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from pipeload.errors import ExportError

__all__ = ["has_module", "has_optimum", "how_to_install", "require_exporters", "require_modules"]

_LIBRARIES = ("onnx", "safetensors", "torch", "transformers")
"""What makes an ONNX graph of a checkpoint, with one of those below."""


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it (its parents are)."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def require_modules(*names: str, extra: str = "export") -> None:
    """Raise one ExportError that names every module that is not installed, or return."""
    if missing := [name for name in names if not has_module(name)]:
        raise ExportError(
            f"This needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install the extra: {how_to_install(extra)}."
        )


def how_to_install(extra: str = "export") -> str:
    """The command, as README.md has it: by name, an index might have another package or none."""
    return f"pip install '.[{extra}]' in the folder of pipeload's source"


def require_exporters() -> None:
    """Raise ExportError if a library that makes ONNX graphs of checkpoints is missing."""
    if has_optimum():
        require_modules(*_LIBRARIES, "optimum.exporters.onnx")
    else:
        require_modules(*_LIBRARIES, "onnxscript", extra="export-torch")


def has_optimum() -> bool:
    """Whether the installed transformers is one that optimum-onnx runs on: 4. torch's own exporter takes newer ones."""
    try:
        return version("transformers").partition(".")[0] == "4"
    except PackageNotFoundError:
        return True  # it lies on the path without its metadata
