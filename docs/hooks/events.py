"""What mkdocs calls while it builds the site: pages from the repository and from the code, and links between them."""

from __future__ import annotations

from pathlib import PurePosixPath

from links import in_site
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from places import ROOT, pages, pictures
from reference import commands, decisions, python_api

__all__ = ["on_config", "on_files", "on_page_markdown"]

_MADE = {"adr/index.md": decisions, "reference/commands.md": commands, "reference/python.md": python_api}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put all pages that a pattern of the navigation stands for in its place."""
    for section in config.nav or []:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [one for entry in entries for one in _matching(entry)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for page, file in pages().items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text("utf-8")))
    for picture in pictures():
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    for page, make in _MADE.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Make links of the repository links of the site."""
    uri = page.file.src_uri
    if uri in _MADE:
        return markdown
    file = pages().get(uri, f"docs/{uri}")
    return in_site(markdown, PurePosixPath(file), uri, files.src_uris)


def _matching(entry: object) -> list[object]:
    if not isinstance(entry, str) or "*" not in entry:
        return [entry]
    folder = ROOT if entry.startswith("benchmarks/") else ROOT / "docs"
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob(entry))]
