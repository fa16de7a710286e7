"""The words that CONTRIBUTING.md leaves out of docstrings, comments, messages and pages."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LEFT_OUT = re.compile(r"\b(so many|whoever|nobody|somebody)\b", re.IGNORECASE)


def test_an_actor_has_a_name_and_a_number_comes_first() -> None:
    folders = [_ROOT / name for name in ("engine", "exporter", "docs", "benchmarks", "examples", "models")]
    files = [path for folder in folders for kind in ("*.py", "*.md") for path in folder.rglob(kind)]
    files += [_ROOT / "README.md", _ROOT / "CHANGELOG.md"]
    found = [
        f"{path.relative_to(_ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if _LEFT_OUT.search(line)
    ]
    assert not found, "\n".join(found)
