"""Is the extra [export] installed? Asked before anything is fetched or written."""

from __future__ import annotations

from importlib.util import find_spec

from pipeload.errors import ExportError

__all__ = ["has_module", "require_modules"]


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
