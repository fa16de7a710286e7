"""Which page of the site shows which file of the repository."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["ROOT", "page_of", "pages", "pictures"]

ROOT = Path(__file__).parents[2]
_ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "models/README.md": "recipes.md",
}
_BENCHMARKS, _DECISIONS = "benchmarks", "adr/index.md"


def pages() -> dict[str, str]:
    """Page -> file, of all files outside of docs/ that are pages; as paths in the site and in the repository."""
    found = {page: file for file, page in _ELSEWHERE.items()}
    return found | {one: one for one in _below(_BENCHMARKS, "README.md")}


def pictures() -> list[str]:
    """Pictures of pages outside of docs/, which have the same path in the site."""
    return _below(_BENCHMARKS, "*.png")


def page_of(file: PurePosixPath) -> str:
    """The path in the site that a file or folder of the repository would have, whether it is there or not."""
    if str(file) == "docs/adr":
        return _DECISIONS
    if (ROOT / file).is_dir():
        file /= "README.md"
    if file.parts[0] == "docs":
        return str(file.relative_to("docs"))
    return _ELSEWHERE.get(str(file), str(file))


def _below(folder: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern))
