"""The files of a checkpoint folder: its weights and their size, and the others that a model needs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipeload.errors import ConfigError, ExportError
from pipeload.format.safetensors import Entry, entries
from pipeload.machine.files import open_file, read_file
from pipeload.tasks.model_files import SENTENCE_FILES
from pipeload_export.extra import require_modules
from pipeload_export.source.gguf_header import check_header

__all__ = [
    "NARROW",
    "SIDE_FILES",
    "choose_weights",
    "float32_bytes",
    "read_header",
    "read_json",
    "side_files",
    "side_files_of_graph",
    "weight_files",
]

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    *SENTENCE_FILES,
)
"""Files that a sharded model directory keeps as they are, beside the settings and weights of the modules of
sentence-transformers (`1_Pooling/config.json`, `2_Dense/model.safetensors`)."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_MAX_HEADER_BYTES = 100 << 20
_MAX_JSON_BYTES = 64 << 20
NARROW = ("F16", "BF16")
"""Names of 16-bit floats in the header of a safetensors file."""


def choose_weights(names: Iterable[str], where: str) -> list[str]:
    """The files with the weights, among the names of the files at the top of a folder or repository.

    Either safetensors (with their index, if there are several), or one GGUF file, which is then alone in the list.

    Raises:
        ConfigError: there are none, or only files that pipeload does not open.
    """
    names = sorted(names)
    if _SINGLE in names:
        return [_SINGLE]
    if _INDEX in names:
        return [_INDEX, *(name for name in names if _PART.fullmatch(name))]
    gguf = [name for name in names if name.endswith(".gguf")]
    if len(gguf) == 1:
        return gguf
    if gguf:
        raise ConfigError(f"{where} holds several GGUF files: {', '.join(gguf)}. Pass the path of one of them.")
    if onnx := [name for name in names if name.endswith(".onnx")]:
        raise ConfigError(f"{where} holds no checkpoint, but {', '.join(onnx)}. Pass the path of the .onnx file.")
    if pickles := [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]:
        raise ConfigError(
            f"{where} holds its weights only as {', '.join(pickles)}. Such files can run code when they are opened, so "
            "pipeload refuses them. Convert them to safetensors (model.save_pretrained(FOLDER) of transformers)."
        )
    raise ConfigError(
        f"{where} holds no weights: neither {_SINGLE}, nor {_INDEX}, nor a .gguf file. "
        "Pass a checkpoint folder, a .gguf or .onnx file, catalog:NAME or a hub id."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises ExportError if it cannot be read or is damaged."""
    try:
        value = json.loads(read_file(path, most_bytes=_MAX_JSON_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}. Fetch it again.") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is no JSON: {error}. Repair it or fetch it again.") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds no JSON object. Repair it or fetch it again.")
    return value


def side_files(folder: Path) -> dict[str, Path]:
    """Path in the sharded model directory -> file of this folder, for those that it has."""
    names = list(SIDE_FILES)
    modules = folder / "modules.json"
    if modules.is_file():
        try:
            for module in json.loads(read_file(modules, most_bytes=_MAX_JSON_BYTES)):
                path = PurePosixPath(module["path"])
                names.append(str(path / "config.json"))
                if path.name and not str(module.get("type")).endswith("Transformer"):
                    names.append(str(path / _SINGLE))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ExportError(f"{modules} is damaged: {error!r}. Fetch it again.") from error
    inside = [name for name in dict.fromkeys(names) if ".." not in name and not name.startswith("/")]
    return {name: folder / name for name in inside if (folder / name).is_file()}


def side_files_of_graph(path: Path) -> dict[str, Path]:
    """`side_files` of an `.onnx` file: those beside it, or one folder up, where the hub's folders `onnx` have them."""
    files = side_files(path.parent)
    if "config.json" in files or path.absolute().parent.name != "onnx":
        return files
    return side_files(path.absolute().parents[1]) | files


def float32_bytes(folder: Path, weights: list[str]) -> int:
    """Bytes of all weights once their floats are float32, from the files' headers. Nothing else is read.

    Raises:
        ExportError: a file is missing, truncated or damaged.
    """
    if weights[0].endswith(".gguf"):
        return _gguf_bytes(folder / weights[0])
    return sum(map(_safetensors_bytes, _parts(folder, weights)))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        ConfigError: there are none.
        ExportError: one is missing.
    """
    return _parts(folder, choose_weights((path.name for path in folder.iterdir()), f"'{folder}'"))


def _parts(folder: Path, weights: list[str]) -> list[Path]:
    """The files with tensors: those that the index names, if there is one."""
    if weights[0] == _INDEX:
        parts = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise ExportError(f"{folder / _INDEX} has no weight_map. Fetch the checkpoint again.")
        weights = sorted(set(parts.values()))
    if outside := [name for name in weights if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise ExportError(f"{folder / _INDEX} names {outside[0]!r}, outside of its own folder. Fetch it again.")
    if missing := [name for name in weights if not (folder / name).is_file()]:
        raise ExportError(f"{folder} lacks {', '.join(missing)}. Fetch the checkpoint again.")
    return [folder / name for name in weights]


def read_header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str] | None, int]:
    """The header of a safetensors file: tensor -> its entry, the metadata, and the first byte behind the header.

    Raises:
        ValueError: it is damaged.
    """
    length = int.from_bytes(file.read(8), "little")
    tensors, metadata = entries(file.read(min(length, _MAX_HEADER_BYTES)))
    return tensors, metadata, 8 + length


def _safetensors_bytes(path: Path) -> int:
    with open_file(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        try:
            tensors, _, begin = read_header(file)
        except ValueError as error:
            raise ExportError(f"{path} is no safetensors file: {error!r}. Fetch it again.") from error
        nbytes = os.fstat(descriptor).st_size
    end = begin + max((entry.data_offsets[1] for entry in tensors.values()), default=0)
    if nbytes != end:
        raise ExportError(f"{path} has {nbytes} bytes where its header says {end}. Fetch it again.")
    return sum(prod(entry.shape) * 4 if entry.dtype in (*NARROW, "F32") else entry.nbytes for entry in tensors.values())


def _gguf_bytes(path: Path) -> int:
    require_modules("gguf", "sentencepiece")
    from gguf import GGUFReader

    try:
        check_header(path)
        tensors = GGUFReader(path).tensors
        counts = [int(tensor.n_elements) for tensor in tensors]
        spans = sorted((int(one.data_offset), int(one.data_offset + one.n_bytes)) for one in tensors)
        if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
            raise ValueError("two of its tensors share bytes")
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}. Fetch it again.") from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ExportError(f"{path} is no GGUF file, or a damaged one: {error}. Fetch it again.") from error
    return 4 * sum(counts)
