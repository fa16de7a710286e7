"""`pipeload catalog`: the models that `pipeload export catalog:NAME` knows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeload.cli.options import Json
from pipeload.cli.report import print_json, table
from pipeload.cli.terminal import say
from pipeload_export.source.catalog import PackageRecipe, recipes

__all__ = ["catalog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    task: str
    weights: str
    licence: str
    about: str


def catalog(as_json: Json = False) -> None:
    """List the models that `pipeload export catalog:NAME` makes.

    Real weights come from packages of the package index. Seeded ones are random, in a published shape, to measure
    with.

    Examples:
        pipeload catalog

        pipeload catalog --json
    """
    entries = [
        _Entry(
            name=name,
            task=recipe.task,
            weights="real" if isinstance(recipe, PackageRecipe) else "seeded",
            licence=recipe.licence,
            about=recipe.about,
        )
        for name, recipe in recipes().items()
    ]
    if as_json:
        print_json([asdict(entry) for entry in entries])
    else:
        say(table([("name", "task", "weights", "licence", "what it is"), *(asdict(each).values() for each in entries)]))
