"""Is the extra [export] installed? Asked before anything is fetched or written."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from pipeload.errors import ExportError

__all__ = ["has_module", "require_exporters", "require_modules"]

_LIBRARIES = ("onnx", "optimum.exporters.onnx", "safetensors", "torch", "transformers")
"""What makes an ONNX graph of a checkpoint."""
_TRANSFORMERS = 4
"""The only major version that optimum-onnx runs on (docs/adr/0012)."""


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it (its parents are)."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def require_modules(*names: str) -> None:
    """Raise one ExportError that names every module that is not installed, or return."""
    if missing := [name for name in names if not has_module(name)]:
        raise ExportError(
            f"This needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "Install the extra: pip install 'pipeload[export]'."
        )


def require_exporters() -> None:
    """Raise ExportError if a library that makes ONNX graphs of checkpoints is missing, or too new for the others."""
    require_modules(*_LIBRARIES)
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return  # it lies on the path without its metadata
    major = found.partition(".")[0]
    if major != str(_TRANSFORMERS):
        raise ExportError(
            f"transformers {found} is installed, and optimum-onnx traces checkpoints with transformers {_TRANSFORMERS} "
            f"only, also those that transformers {major} has saved. Install it: pip install "
            f"'transformers<{_TRANSFORMERS + 1}'. Or write an .onnx file with torch.onnx.export(dynamo=True), and pass "
            "that."
        )
