"""Weights files whose header and bytes do not fit together.

The attacker gives away a model directory, of which he writes the manifest too, so that all hashes are right. He wants
the engine to use bytes that are no weights, to take memory that no plan counts, or to work for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks.attack import HELD, SucceededError, attack, in_child, refused, run_module
from tests.attacks.victims import WEIGHTS, change_manifest, model_directory, read_all

from pipeload.errors import ManifestError, ShardError

Header = dict[str, Any]


def _rewritten(directory: Path, header: bytes | Callable[[Header], object]) -> Path:
    """Another header in a weights file, of the same length or longer, and the manifest that fits it."""
    path = directory / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if callable(header):
        made = json.loads(data[8 : 8 + length])
        header(made)
        header = json.dumps(made).encode()
    header = header.ljust(length)
    assert len(header) == length, len(header)
    path.write_bytes(data[:8] + header + data[8 + length :])
    return _true(directory)


def _true(directory: Path) -> Path:
    """The manifest with sizes and hashes of the weights file as it is."""
    data = (directory / WEIGHTS).read_bytes()

    def change(made: Any) -> None:
        for record in made["files"]:
            if record["path"] == WEIGHTS:
                record |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "ranges_apart": False}
        for shard in made["shards"]:
            if (span := shard["weights"]) and span["path"] == WEIGHTS:
                piece = data[span["offset"] : span["offset"] + span["nbytes"]]
                span["sha256"] = hashlib.sha256(piece).hexdigest()

    return change_manifest(directory, change)


def _entry(name: str, **changes: Any) -> Callable[[Header], object]:
    return lambda made: made[name].update(changes)


_TENSOR = "block.1.w"
_HEADERS: dict[str, tuple[bytes | Callable[[Header], object], str]] = {
    "no JSON": (b"{", "damaged"),
    "a list": (b"[]", "damaged"),
    "a name twice": (b'{"block.1.w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"block.1.w":0}', "twice"),
    "a dtype that does not exist": (_entry(_TENSOR, dtype="F1"), "damaged"),
    "a negative offset": (_entry(_TENSOR, data_offsets=[-16384, 0]), "data_offsets"),
    "a huge offset": (_entry(_TENSOR, data_offsets=[2**63, 2**63 + 16384]), "data_offsets"),
    "an offset that is no integer": (_entry(_TENSOR, data_offsets=[0.0, 16384.0]), "data_offsets"),
    "NaN": (b'{"block.1.w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16384]}}', "damaged"),
    "Infinity": (b'{"block.1.w":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', "damaged"),
    "a negative size": (_entry(_TENSOR, shape=[-64, -64]), "shape"),
    "a product that overflows": (_entry(_TENSOR, shape=[2**62, 4, 0]), "is not that of its shape"),
    "another shape": (_entry(_TENSOR, shape=[32, 128]), "is not the file that the manifest describes"),
    "another place": (_entry(_TENSOR, data_offsets=[256, 16640]), "is not the file that the manifest describes"),
}


@attack
def headers_that_lie(folder: Path) -> str:
    """The header has wrong dtypes, shapes, places, NaN, a name twice, or is no JSON, and all hashes are right."""
    outcome = HELD
    for number, (header, says) in enumerate(_HEADERS.values()):
        directory = _fresh(folder, number)
        outcome = refused(lambda d=directory, h=header: read_all(_rewritten(d, h)), ShardError, says)
    return outcome


@attack
def lengths_of_headers(folder: Path) -> str:
    """The header claims 0, 1, 2^63, or all bytes of the file."""
    outcome = HELD
    for number, length in enumerate((0, 1, 2**63, 2**64 - 1, 20_000)):
        directory = _fresh(folder, number)
        data = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
        outcome = refused(lambda d=directory: read_all(_true(d)), ShardError)
    return outcome


@attack
def a_header_as_large_as_memory(folder: Path) -> str:
    """The header has 90 MB of entries, each of which would become an object."""
    directory = _fresh(folder, 0)
    entries = b'{"a":[' + b"0," * (45 << 20) + b"0]}"
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(len(entries).to_bytes(8, "little") + entries + data)
    return refused(lambda: read_all(_true(directory)), ShardError, "takes at most")


@attack
def numbers_of_a_million_digits(_folder: Path) -> str:
    """A shape of hundreds of numbers of thousands of digits, whose product takes hours."""
    code = """
from pipeload.format.safetensors import places
shape = "[" + ",".join(["9" * 4000] * 250) + "]"
try:
    places(b'{"w":{"dtype":"F32","shape":' + shape.encode() + b',"data_offsets":[0,1]}}')
except ValueError as error:
    print(error)
"""
    told = in_child(code)
    assert "length <= 64" in told, told
    return f"refused: {told}"


@attack
def deep_headers(folder: Path) -> str:
    """The header is nested 100,000 deep."""
    directory = _fresh(folder, 0)
    header = b'{"a":' + b"[" * 100_000
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
    return refused(lambda: read_all(_true(directory)), ShardError, "damaged")


@attack
def bytes_behind_and_between(folder: Path) -> str:
    """Another file lies behind the tensors, or before them: it is never read, and `pipeload verify` covers it too."""
    from pipeload_export import verify

    directory = _fresh(folder, 0)
    path, right = directory / WEIGHTS, read_all(directory)
    path.write_bytes(path.read_bytes() + b"PK")
    refused(lambda: read_all(directory), ShardError, "the manifest says")
    if read_all(_true(directory)) != right:
        raise SucceededError("other bytes were read")
    verify(directory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return refused(lambda: verify(directory), says="is damaged")


@attack
def tensors_that_overlap(folder: Path) -> str:
    """Manifest and header agree that two tensors share their bytes, or that one lies outside of the file."""

    def overlap(made: Any) -> None:
        tensors = made["shards"][2]["tensors"]
        tensors[1]["offset"] = tensors[0]["offset"]

    def outside(made: Any) -> None:
        made["shards"][2]["tensors"][0]["shape"] = [2**40]

    def negative(made: Any) -> None:
        made["shards"][2]["tensors"][0]["offset"] = -4096

    def overflow(made: Any) -> None:
        made["shards"][2]["tensors"][0]["shape"] = [2**62, 2**62]

    outcome = HELD
    for number, change in enumerate((overlap, outside, negative, overflow)):
        directory = change_manifest(_fresh(folder, number), change)
        outcome = refused(lambda d=directory: read_all(d), ManifestError)
    return outcome


@attack
def manifests_of_odd_json(folder: Path) -> str:
    """The manifest has NaN, numbers of 10,000 digits, 100,000 brackets, or a field of another type."""
    directory = _fresh(folder, 0)
    outcome = HELD
    for text in ('{"format": NaN}', '{"format": ' + "9" * 10_000 + "}", "[" * 100_000, '{"format": 1, "shards": 5}',
                 '{"format": 1.5}', "", "\0", '{"format": 1, "format": 2}'):  # fmt: skip
        (directory / "pipeload.json").write_text(text)
        outcome = refused(lambda: read_all(directory), ManifestError)
    return outcome


def _fresh(folder: Path, number: int) -> Path:
    own = folder / str(number)
    own.mkdir()
    return model_directory(own)


if __name__ == "__main__":
    run_module(Path(__file__).stem)
