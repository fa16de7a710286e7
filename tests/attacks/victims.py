"""What is attacked: a sharded model directory with every kind of file, and the ways in which it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tests.engine import toy as toys
from tests.engine.tasks.fakes import write_gpt_tokenizer, write_json

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.model_files import ModelFiles
from pipeload.storage.weights import Storage

__all__ = ["FILES", "GRAPH", "TABLE", "WEIGHTS", "change_manifest", "model_directory", "read_all", "run_model"]

GRAPH, WEIGHTS, TABLE = "shards/block.001.onnx", "shards/block.001.safetensors", "shards/embeddings.safetensors"
_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILES = (MANIFEST_NAME, GRAPH, WEIGHTS, TABLE, *_SETTINGS)
"""One of each kind of file that is read."""
_SECRET = "the secret"


def model_directory(folder: Path) -> Path:
    """A toy with a tokenizer, a chat template and settings, as a stranger gives it; and a secret beside it."""
    (folder / "secret.txt").write_text(_SECRET)
    directory = toys.make_toy(folder / "model", blocks=3)
    write_gpt_tokenizer(directory, chat_template="{{ messages }}")
    write_json(directory, "config.json", {"vocab_size": toys.VOCABULARY})
    write_json(directory, "generation_config.json", {"eos_token_id": 0})
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def change_manifest(directory: Path, change: Callable[[Any], object]) -> Path:
    """Change the manifest, as JSON. Returns the directory."""
    path = directory / MANIFEST_NAME
    made = json.loads(path.read_bytes())
    change(made)
    path.write_text(json.dumps(made))
    return directory


def read_all(directory: Path) -> bytes:
    """Read every kind of file as the engine does; all bytes of settings."""
    manifest = manifests.read(directory)
    storage, files = Storage(directory, manifest), ModelFiles(directory, manifest)
    for shard in manifest.shards:
        storage.graph(shard)
        storage.read_weights(shard, [Part(0, shard.nbytes, Buffer(shard.nbytes))], lambda: False)
        for lookup in shard.lookups:
            storage.read_rows(lookup, np.array([1]), keep_cached=True)
    return b"".join(files.read(name) or b"" for name in _SETTINGS)


def run_model(directory: Path) -> Any:
    """Open a model and run it once."""
    with pipeload.load(directory, "auto") as model:
        return model.run(toys.inputs())
