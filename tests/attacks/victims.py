"""What is attacked: a sharded model directory with every kind of file, and the ways in which it is used."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tests.engine import toy as toys
from tests.engine.serve.client import settings
from tests.engine.tasks.fakes import write_gpt_tokenizer, write_json

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME
from pipeload.serve.log import LOGGER, set_up_log
from pipeload.serve.port import listening_socket
from pipeload.serve.server import _Server
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.model_files import ModelFiles
from pipeload.storage.weights import Storage

__all__ = [
    "FILES",
    "GRAPH",
    "TABLE",
    "WEIGHTS",
    "Server",
    "change_manifest",
    "model_directory",
    "read_all",
    "rest_of",
    "run_model",
    "statuses",
]

GRAPH, WEIGHTS, TABLE = "shards/block.001.onnx", "shards/block.001.safetensors", "shards/embeddings.safetensors"
_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILES = (MANIFEST_NAME, GRAPH, WEIGHTS, TABLE, *_SETTINGS)
"""One of each kind of file that is read."""
_SECRET = "the secret"
_PATIENCE_S = 60.0


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


class Server:
    """A server in this process, on a port of its own.

    Args:
        directories: of its models.
        options: other settings.

    Attributes:
        port: of TCP.
        log: what it has written to its log, as text, so far.
    """

    def __init__(self, *directories: Path, **options: Any) -> None:
        self._settings = settings(*directories, budget="auto", log_format="text", **options)
        self._log = io.StringIO()

    @property
    def log(self) -> str:
        return self._log.getvalue()

    def __enter__(self) -> Server:
        self._listening = listening_socket("127.0.0.1", 0)
        self.port = self._listening.getsockname()[1]
        self.running = _Server(self._settings, self._listening, replaceable=False)
        set_up_log("text")
        self._handlers = [*LOGGER.handlers]
        LOGGER.handlers[0].stream = self._log  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self.running.serve_all)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running.stop()
        self._thread.join()
        self._listening.close()
        LOGGER.handlers = []

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE_S)

    def send(self, data: bytes) -> bytes:
        """Send bytes on a connection of their own; all that comes until the server closes it."""
        with self.connect() as connected:
            with suppress(ConnectionError):
                connected.sendall(data)
            return rest_of(connected)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, bytes]:
        """Status, head and body of the answer to a request."""
        given = {"Host": f"localhost:{self.port}", "Connection": "close", "Content-Type": "application/json"}
        given |= {"Content-Length": str(len(body))} | {name.replace("_", "-"): text for name, text in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {text}\r\n" for name, text in given.items())
        told, _, answer = self.send(head.encode("latin-1") + b"\r\n" + body).partition(b"\r\n\r\n")
        return int(told.split()[1]), told, answer


def rest_of(connected: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    pieces = []
    with suppress(ConnectionError):
        while piece := connected.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def statuses(answers: bytes) -> list[int]:
    """The statuses of all answers on a connection."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answers)]
