"""The models that benchmarks run: exported if they are missing, with the unsplit graph beside them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import pipeload_export
from pipeload.bench.spec import Unsplit
from pipeload.format.manifest import MANIFEST_NAME
from pipeload_export.check.merge import merge

__all__ = ["ROOT", "exported", "joined", "weight_bytes"]

ROOT = Path(__file__).resolve().parents[1]
_EXPORTED = ROOT / "models" / "exported"


def exported(name: str, console: Console, weights: pipeload_export.Weights = "auto") -> tuple[Path, Unsplit]:
    """The sharded directory of a recipe of models/catalog.toml, and the graph that it was cut from."""
    directory = _EXPORTED / (name if weights == "auto" else f"{name}-{weights}")
    unsplit = directory.with_name(f"{directory.name}-unsplit")
    if not (directory / MANIFEST_NAME).exists() or not unsplit.exists():
        console.print(f"Exporting {name} to {directory.relative_to(ROOT)} ...")
        pipeload_export.export(f"catalog:{name}", directory, weights=weights, keep_onnx=unsplit, force=True)
    return directory, Unsplit(graph=unsplit / "model.onnx", folder=unsplit)


def joined(directory: Path, folder: Path) -> Unsplit:
    """The shards as one graph over the same files, whose weights can be memory-mapped."""
    return Unsplit(graph=merge(directory, folder / f"{directory.name}.onnx"), folder=directory)


def weight_bytes(directory: Path) -> int:
    """Bytes of all weights files, tables included."""
    return sum(path.stat().st_size for path in (directory / "shards").glob("*.safetensors"))
