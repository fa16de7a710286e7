"""Only `pipeload.machine` opens files to read: all else gets regular files of bounded size from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pipeload

_OPENING = {"open", "read_bytes", "read_text", "memmap", "fromfile", "from_file", "safe_open"}
_PACKAGE = Path(pipeload.__file__).parent
_ALLOWED = {
    # Files that the user's own benchmarks write and read.
    "bench",
    # The kernel's own files.
    "machine/memory.py",
    "machine/hardware.py",
    # The one place.
    "machine/files.py",
}


def _openings() -> Iterator[str]:
    for path in _PACKAGE.rglob("*.py"):
        place = path.relative_to(_PACKAGE).as_posix()
        if place in _ALLOWED or place.split("/")[0] in _ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                method = isinstance(node.func, ast.Attribute)
                name = node.func.attr if method else getattr(node.func, "id", "")
                writes = any(isinstance(a, ast.Constant) and a.value in ("w", "wb") for a in node.args)
                if name in _OPENING and (method or name == "open") and not writes:
                    yield f"{place}:{node.lineno}: {ast.unparse(node)[:60]}"


def test_no_other_module_opens_a_file_to_read() -> None:
    # Pillow gets bytes, and the files of a model are opened by `machine/files`.
    found = [line for line in _openings() if "PIL.Image.open(" not in line and "self._files.open(" not in line]
    assert found == []
