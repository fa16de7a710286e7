"""The pages of the site follow the links that GitHub follows; `make docs` builds it."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_site(monkeypatch: pytest.MonkeyPatch) -> Any:
    # mkdocs puts the folder of a hook there, too.
    monkeypatch.syspath_prepend(_ROOT / "docs" / "hooks")
    from links import in_site

    yield in_site
    for name in ("links", "places"):
        del sys.modules[name]


_KNOWN = {"index.md", "serving.md", "adr/0008-caches-in-place.md", "adr/index.md", "benchmarks/demo/README.md"}


@pytest.mark.parametrize(
    ("file", "page", "text", "shown"),
    [
        ("README.md", "index.md", "[a](docs/serving.md#idle)", "[a](serving.md#idle)"),
        ("docs/serving.md", "serving.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/serving.md", "serving.md", "[a](../benchmarks/demo)", "[a](benchmarks/demo/README.md)"),
        ("README.md", "index.md", "[decisions](docs/adr)", "[decisions](adr/index.md)"),
        (
            "benchmarks/demo/README.md",
            "benchmarks/demo/README.md",
            "[ADR 8](../../docs/adr/0008-caches-in-place.md)",
            "[ADR 8](../../adr/0008-caches-in-place.md)",
        ),
        # What the site does not show is a path in the repository.
        ("docs/serving.md", "serving.md", "[tests/engine](../tests/engine)", "`tests/engine`"),
        ("docs/serving.md", "serving.md", "[the engine](../engine)", "the engine (`engine`)"),
        # mkdocs reports what leads nowhere.
        ("docs/serving.md", "serving.md", "[a](nowhere.md)", "[a](nowhere.md)"),
        ("README.md", "index.md", "[a](https://x.org) [b](#more)", "[a](https://x.org) [b](#more)"),
        # Code is no link, and a list begins after an empty line.
        ("README.md", "index.md", "```\n[a](docs/serving.md)\n```\n", "```\n[a](docs/serving.md)\n```\n"),
        ("README.md", "index.md", "Two:\n- one\n- two\n", "Two:\n\n- one\n- two\n"),
        ("README.md", "index.md", "```\nx\n```\n- one\n", "```\nx\n```\n\n- one\n"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(
    in_site: Any, file: str, page: str, text: str, shown: str
) -> None:
    assert in_site(text, PurePosixPath(file), page, _KNOWN) == shown
