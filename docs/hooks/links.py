"""Pages as GitHub shows them, made pages of the site: mostly their links.

A link to a file that the site does not show becomes the file's path in the repository, as code. One to a file that is
not there stays as it is, so that mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container
from pathlib import PurePosixPath

from places import ROOT, page_of

__all__ = ["in_site"]

_FENCE = re.compile(r"^( *```.*?^ *```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_LIST_AFTER_TEXT = re.compile(r"(\A|^[^\s|>#-].*)\n(?=- )", re.MULTILINE)
"""Python-Markdown begins a list only after an empty line."""
_ELSEWHERE = re.compile(r"[a-z]+:|#|/")


def in_site(markdown: str, file: PurePosixPath, page: str, known: Container[str]) -> str:
    """The text of a page for the site.

    Args:
        markdown: the text of a file.
        file: its path in the repository.
        page: its path in the site.
        known: paths of all files of the site.
    """

    def link(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        if _ELSEWHERE.match(target):
            return found[0]
        path, sharp, anchor = target.partition("#")
        place = PurePosixPath(posixpath.normpath(file.parent / path))
        if (shown := page_of(place)) in known:
            return f"{mark}[{label}]({posixpath.relpath(shown, posixpath.dirname(page) or '.')}{sharp}{anchor})"
        if not (ROOT / place).exists():
            return found[0]
        plain = label.strip("`")
        return f"`{place}`" if str(place).rstrip("/").endswith(plain.rstrip("/")) else f"{label} (`{place}`)"

    def text(part: str) -> str:
        return _LIST_AFTER_TEXT.sub(r"\1\n\n", _LINK.sub(link, part))

    # Every second part is a block of code.
    return "".join(part if number % 2 else text(part) for number, part in enumerate(_FENCE.split(markdown)))
