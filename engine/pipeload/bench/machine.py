"""Facts about the machine of a benchmark, stored beside its figures."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeload.machine.hardware import cores, cpu_name, memory_bytes

__all__ = ["machine_facts", "machine_line"]

_PACKAGES = ("pipeload", "onnxruntime", "numpy")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, kernel and versions."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """Those facts that figures depend on most, in one line."""
    return f"{facts['cores']} cores, {facts['cpu']}, onnxruntime {facts['versions']['onnxruntime']}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
