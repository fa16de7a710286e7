"""Tokenizer and image processor that lie beside an `.onnx` file -> as transformers makes them, in a child process.

They say the same as those of a checkpoint, and are read by the same code: tokenizer_config.json overrides
tokenizer.json, a vocabulary may lie there alone, and the engine must make the same ids and pixel values.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec

from pipeload.errors import ExportError
from pipeload.notify import Notify
from pipeload_export.extra import has_module
from pipeload_export.source.external import check_links
from pipeload_export.source.folder import read_json, side_files
from pipeload_export.source.image_processor import resolve_image_processor
from pipeload_export.source.older_form import older_tokenizer_config
from pipeload_export.source.sources import Unsplit
from pipeload_export.source.tokenizer import TOKENIZER_FILES, resolve_tokenizer
from pipeload_export.source.tracer import serve
from pipeload_export.source.tracing import RESOLVED, run_child

__all__ = ["resolve_beside", "run_child_beside"]

_CHILD = "import sys; from pipeload_export.source.beside import run_child_beside; run_child_beside(*sys.argv[1:])"
_LIBRARIES_BYTES = 500 << 20
_MORE_FILES = ("added_tokens.json", "bpe.codes", "merges.txt", "source.spm", "target.spm")
"""Files that some vocabularies are nothing without."""
_CONFIG, _SETTINGS, _PROCESSOR = "config.json", "tokenizer_config.json", "preprocessor_config.json"
_CONFIG_KEYS = ("model_type", "tokenizer_class", "image_size", "num_channels")
"""Keys of config.json that tell of tokenizers and images. The others tell of the graph, which is made already."""


class _Beside(msgspec.Struct, frozen=True, kw_only=True):
    """The parent's request to the child.

    Attributes:
        files: file name -> path.
        trust_remote_code: run the tokenizer's own Python files.
    """

    files: dict[str, str]
    trust_remote_code: bool = False


def resolve_beside(found: Unsplit, work: Path, progress: Notify, *, trust_remote_code: bool = False) -> Unsplit:
    """The model of an `.onnx` file with its tokenizer and image processor resolved; where transformers is not
    installed, as it is.

    Args:
        found: the model.
        work: folder for what is written.
        progress: told of the step.
        trust_remote_code: run the Python code that a tokenizer brings along.

    Raises:
        ExportError: transformers cannot open them, one brings Python code that is not allowed, or the engine would make
            other ids of a text or pixels of an image.
    """
    files = _vocabularies(found) | dict(found.side_files)
    if not {*TOKENIZER_FILES, _PROCESSOR} & files.keys() or not has_module("transformers"):
        return found
    progress("resolve the tokenizer", 0, 0)
    folder = work / "beside"
    folder.mkdir()
    error = run_child(
        _CHILD,
        _Beside(
            files={name: str(path.absolute()) for name, path in (_code(found) | files).items()},
            trust_remote_code=trust_remote_code,
        ),
        folder,
        fact=f"Reading the files beside '{found.source}'",
        needed=_LIBRARIES_BYTES,
        online=trust_remote_code,
        tick=lambda: None,
    )
    if error:
        raise ExportError(f"'{found.source}' cannot be exported with the files beside it: {error}")
    return replace(found, side_files={**found.side_files, **side_files(folder / RESOLVED)})


def run_child_beside(request_path: str, folder: str, parent: str) -> None:
    """Carry out the request, and leave the answer beside the folder."""
    serve(_Beside, _resolve, request_path, folder, parent)


def _vocabularies(found: Unsplit) -> dict[str, Path]:
    """The files of tokenizers that a sharded model directory does not keep, where the others lie.

    Raises:
        ExportError: one is a link out of its folder.
    """
    places = [folder / name for folder in _folders(found) for name in (*TOKENIZER_FILES, *_MORE_FILES)]
    for place in places:
        check_links([place], place.parent, found.source)
    return {place.name: place for place in places if place.is_file()}


def _code(found: Unsplit) -> dict[str, Path]:
    """The Python files there, of which some tokenizers are made."""
    return {path.name: path for folder in _folders(found) for path in folder.glob("*.py")}


def _folders(found: Unsplit) -> list[Path]:
    """Where the files of the model lie; those of a later folder win."""
    return list(dict.fromkeys([found.path.parent, *(path.parent for path in found.side_files.values())]))[::-1]


def _resolve(request: _Beside, folder: Path) -> None:
    source = folder.with_name("source")
    source.mkdir()
    for name, path in request.files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(path)
    config, settings = read_json(source / _CONFIG), read_json(source / _SETTINGS)
    _write(source / _CONFIG, {key: config[key] for key in _CONFIG_KEYS if key in config})
    if settings:
        _write(source / _SETTINGS, older_tokenizer_config(settings, has_json="tokenizer.json" in request.files))
    if "tokenizer.json" in request.files or settings or "model_type" in config:
        resolve_tokenizer(source, folder, trust_remote_code=request.trust_remote_code)
    # Those of speech have a rate.
    if "sampling_rate" not in read_json(source / _PROCESSOR):
        resolve_image_processor(source, folder)


def _write(path: Path, value: object) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(value))
