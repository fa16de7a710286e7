"""Troubleshooting goes by messages that the code has: a message that is changed is changed there, too."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGE = _ROOT / "docs" / "guides" / "troubleshooting.md"
_HEADINGS = re.findall(r"^### `(.*)`$", _PAGE.read_text("utf-8"), re.MULTILINE)


@lru_cache(maxsize=1)
def _messages() -> list[str]:
    """All texts in the code of both packages, with a mark where a value is put in."""
    found = []
    for folder in ("engine", "exporter"):
        for path in (_ROOT / folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    found.append(node.value)
    return found


def test_there_are_headings() -> None:
    assert len(_HEADINGS) > 20
    assert len(set(_HEADINGS)) == len(_HEADINGS)


@pytest.mark.parametrize("heading", _HEADINGS)
def test_a_heading_has_the_words_of_a_message(heading: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in heading.split("...")]
    words = re.compile(".*".join(pieces), re.DOTALL)
    assert any(words.search(message) for message in _messages()), heading
