"""The emulated environment has the packages that the tests in it import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from tests.arm64.environment import REPOSITORY, _requirements

_OURS = {"benchmarks", "pipeload", "pipeload_export", "tests"}


def _imported_at_once() -> Iterator[str]:
    """Top-level names of the modules that the engine's tests import when they are collected."""
    for path in (REPOSITORY / "tests" / "engine").rglob("*.py"):
        if path.parent.name in ("serve", "cluster") and path.name.startswith("test_"):
            # The folder's conftest leaves these out where the packages of servers and clusters are missing.
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (name.partition(".")[0] for name in names)


def test_what_the_engines_tests_import_is_required() -> None:
    required = {re.split(r"[<>=\[]", requirement)[0].replace("-", "_") for requirement in _requirements()}
    needed = set(_imported_at_once()) - set(sys.stdlib_module_names) - _OURS
    assert needed >= {"numpy", "pytest"}
    assert needed <= required
