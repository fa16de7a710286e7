"""Checkpoints, ONNX files and GGUF files given to the exporter.

The attacker gives away a model, as a folder or an archive. He wants files of the user in the exported directory, which
the user may publish; or the export to run code, to block, or to take memory without end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, helper
from tests.attacks.attack import HELD, attack, refused, run_module
from tests.attacks.shard_graphs import external, planted

from pipeload.errors import ConfigError, ExportError
from pipeload_export.source.gguf_header import check_header
from pipeload_export.source.sources import find_source

_SETTINGS = ("config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt", "merges.txt", "tokenizer.model")


@attack
def links_to_files_of_the_user(folder: Path) -> str:
    """A settings file, vocabulary or template of a checkpoint is a link to a file of the user, and would be copied."""
    outcome = HELD
    for number, name in enumerate((*_SETTINGS, "1_Pooling/config.json")):
        made = _checkpoint(folder / str(number))
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).unlink(missing_ok=True)
        (made / name).symlink_to(folder / "secret.txt")
        (folder / "secret.txt").write_text("{}")
        outcome = refused(lambda made=made: _find(made), ExportError, "outside of its own folder")
    return outcome


@attack
def links_beside_an_onnx_file(folder: Path) -> str:
    """A tokenizer or template beside an .onnx file is a link to a file of the user."""
    (folder / "secret.txt").write_text("{}")
    outcome = HELD
    for number, name in enumerate(("config.json", "tokenizer.json", "chat_template.jinja")):
        path = _onnx(folder / str(number), _model())
        (path.parent / name).symlink_to(folder / "secret.txt")
        outcome = refused(lambda path=path: _find(path), ExportError, "outside of its own folder")
    return outcome


@attack
def weights_elsewhere(folder: Path) -> str:
    """The index of a checkpoint names weights by `..` and by an absolute path."""
    outcome = HELD
    for number, name in enumerate(("../secret.safetensors", "/etc/passwd")):
        made = _checkpoint(folder / str(number))
        (made / "model.safetensors").unlink()
        (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        outcome = refused(lambda made=made: _find(made), ExportError, "outside of its own folder")
    return outcome


@attack
def pipes_and_devices(folder: Path) -> str:
    """The config, the weights or a GGUF file is a pipe that no program writes to, or a link to /dev/zero."""
    outcome = HELD
    makers: tuple[Callable[[Path], object], ...] = (os.mkfifo, lambda path: path.symlink_to("/dev/zero"))
    for number, name in enumerate(("config.json", "model.safetensors", "model.gguf")):
        for kind, make in enumerate(makers):
            made = _checkpoint(folder / f"{number}-{kind}")
            if name == "model.gguf":
                (made / "model.safetensors").unlink()
            (made / name).unlink(missing_ok=True)
            make(made / name)
            outcome = refused(lambda made=made: _find(made), (ExportError, ConfigError))
    return outcome


@attack
def pickles(folder: Path) -> str:
    """The weights are a pickle, which runs a program when it is opened."""
    made = _checkpoint(folder / "model")
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    return refused(lambda: _find(made), ConfigError, "can run code")


@attack
def headers_of_safetensors(folder: Path) -> str:
    """The weights' header has shapes of negative, fractional and enormous numbers, NaN, or nothing."""
    outcome = HELD
    shapes = ("[-1]", "[1.5]", "[" + "9" * 4000 + "]", "[" + ",".join(["9" * 1000] * 1000) + "]", "[NaN]", "{}", "5")
    for number, shape in enumerate(shapes):
        made = _checkpoint(folder / str(number))
        header = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
        (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        outcome = refused(lambda made=made: _find(made), ExportError, "no safetensors file")
    return outcome


@attack
def external_data_in_any_tensor(folder: Path) -> str:
    """Any tensor of an .onnx file lies in /etc/passwd, above the folder, in a link out of it, or in a pipe."""
    outcome = HELD
    (folder / "secret.bin").write_bytes(b"\0" * 40)
    for location in ("/etc/passwd", "../secret.bin", "link", "x/../../secret.bin", "a\0b", "pipe", "", "."):
        for made in planted(_model(), external(location)):
            path = _onnx(folder / "model", made)
            if not (path.parent / "link").is_symlink():
                (path.parent / "link").symlink_to(folder / "secret.bin")
                os.mkfifo(path.parent / "pipe")
            outcome = refused(lambda path=path: _find(path), ExportError)
    return outcome


@attack
def places_that_are_none(folder: Path) -> str:
    """The offset or length of a tensor in a file is negative, fractional, enormous, or in digits of another script."""
    outcome = HELD
    for more in ({"offset": "-8"}, {"offset": "1e3"}, {"length": "9" * 30}, {"offset": "٣"}, {"offset": str(2**63)}):
        model = _model()
        model.graph.initializer.append(external("data", **more))
        path = _onnx(folder / "model", model)
        (path.parent / "data").write_bytes(b"\0" * 100)
        outcome = refused(lambda path=path: _find(path), ExportError)
    return outcome


@attack
def hostile_gguf_headers(folder: Path) -> str:
    """Counts, lengths, nested arrays and tensors of a GGUF file that its bytes cannot hold."""
    text, array = 8, 9

    def key(kind: int, value: bytes) -> bytes:
        return struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value

    def tensor(*shape: int, offset: int = 0, kind: int = 0) -> bytes:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        return struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"t" + dims + struct.pack("<IQ", kind, offset)

    bodies = {
        "2^60 tensors": struct.pack("<QQ", 2**60, 0),
        "2^60 keys": struct.pack("<QQ", 0, 2**60),
        "a text of 2^63 bytes": key(text, struct.pack("<Q", 2**63)),
        "an array of 2^60 numbers": key(array, struct.pack("<IQ", 4, 2**60)),
        "an array of 2^32 texts": key(array, struct.pack("<IQ", 8, 2**32)),
        "an array in an array": key(array, struct.pack("<IQ", 9, 1) * 1000),
        "a type that does not exist": key(99, b""),
        "2^40 values": tensor(2**40),
        "a product that overflows": tensor(2**32, 2**32, 2**32, 2**32),
        "a million dimensions": struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 10**6),
        "an offset behind the file": tensor(4, offset=2**62),
        "a name of 2^40 bytes": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**40),
        "nothing": b"",
    }
    path, outcome = folder / "model.gguf", HELD
    for order in ("<", ">"):
        for body in bodies.values():
            path.write_bytes(b"GGUF" + struct.pack(f"{order}I", 3) + body)
            outcome = refused(lambda: check_header(path), ValueError)
    return outcome


@attack
def gguf_that_a_library_believes(folder: Path) -> str:
    """An alignment of 0 or 3, and tensors that overlap or lie behind the file, which the library believes."""
    outcome = HELD
    alignment = b"general.alignment"
    for number, (value, tensors) in enumerate(
        ((0, [(4, 0)]), (3, [(4, 0)]), (2**31, [(4, 0)]), (32, [(4, 0), (4, 0)]), (32, [(4, 2**20)]))
    ):
        body = struct.pack("<QQ", len(tensors), 1) + struct.pack("<Q", len(alignment)) + alignment
        body += struct.pack("<II", 4, value)
        for place, (size, offset) in enumerate(tensors):
            name = f"t{place}".encode()
            body += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, size, 0, offset)
        made = folder / str(number)
        made.mkdir()
        (made / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + body + b"\0" * 200)
        outcome = refused(lambda made=made: _find(made / "model.gguf"), (ExportError, ConfigError))
    return outcome


def _model() -> ModelProto:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info("x", 1, [10])], [info("y", 1, [10])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def _onnx(folder: Path, model: ModelProto) -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _checkpoint(folder: Path) -> Path:
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    return folder


def _find(path: Path) -> Any:
    return find_source(str(path), progress=lambda *_: None)


if __name__ == "__main__":
    run_module(Path(__file__).stem)
