"""Models of a few pages: each shard turns whole numbers into others by its weights, so every answer can be checked.

```
hidden.0 = table[ids]        hidden.i+1 = (31 hidden.i + sum of the bytes of shard i's weights) mod 1000003
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import (
    PAGE_BYTES,
    ByteTerm,
    FileRecord,
    Lookup,
    Manifest,
    Shard,
    Structure,
    TensorSpec,
    WeightSpec,
    WeightsRange,
)

__all__ = ["KINDS", "Kind", "Model", "make_model", "turned", "weight_of"]

Kind = Literal["plain", "parts", "common", "small", "narrow"]
KINDS: tuple[Kind, ...] = ("plain", "parts", "common", "small", "narrow")
"""One tensor in each shard; several, so that parts may stay; shards with the same weights; shards that are always
packed; weights of 16 bits, which are widened."""

_ROWS = 16
_PRIME = 1_000_003
_GRAPH = FileRecord(path="graph.onnx", nbytes=100, sha256="0" * 64)
_NAMES = {"uint8": "U8", "bfloat16": "BF16", "int64": "I64"}


@dataclass(frozen=True)
class Model:
    """A model, and the bytes of its files."""

    manifest: Manifest
    files: dict[str, bytes]
    table: NDArray[np.int64]
    weights: tuple[int, ...]

    def answer(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The right one."""
        hidden = self.table[ids][..., 0]
        for weight in self.weights:
            hidden = turned(hidden, weight)
        return hidden


def turned(hidden: NDArray[np.int64], weight: int) -> NDArray[np.int64]:
    """A shard's work."""
    return (hidden * 31 + weight) % _PRIME


def weight_of(tensors: Iterable[NDArray[Any]]) -> int:
    """The sum of all bytes of a shard's weights, as they are in memory."""
    return sum(int(np.ascontiguousarray(array).view(np.uint8).sum(dtype=np.int64)) for array in tensors)


@cache
def make_model(kind: Kind, shards: int) -> Model:
    """A model of this kind, the same each time."""
    random = np.random.default_rng(shards)
    files: dict[str, bytes] = {}
    records: list[FileRecord] = []
    table = random.integers(0, _PRIME, (_ROWS, 1), dtype=np.int64)

    def write(path: str, tensors: dict[str, NDArray[Any]]) -> list[WeightSpec]:
        header, begin = {}, 0
        for name, array in tensors.items():
            header[name] = {
                "dtype": _NAMES[array.dtype.name],
                "shape": array.shape,
                "data_offsets": (begin, begin + array.nbytes),
            }
            begin += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        data = len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())
        files[path] = data
        records.append(FileRecord(path=path, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
        return [
            WeightSpec(
                name=name,
                dtype=array.dtype.name,
                shape=array.shape,
                offset=8 + len(text) + header[name]["data_offsets"][0],
                widened=f"{name}.wide" if array.dtype.name == "bfloat16" else None,
            )
            for name, array in tensors.items()
        ]

    (spec,) = write("table", {"table": table})
    lookup = Lookup(path="table", table=spec, indices="ids", output="embedded")
    made: list[Shard] = []
    weights: list[int] = []
    for index in range(shards):
        if kind == "common" and index in (1, 3, 4) and len(made) > 1:
            first = made[1]
            span, specs, weight = first.weights, first.tensors, weights[1]
        else:
            tensors = _tensors(kind, index, random)
            specs = tuple(write(f"w{index}", tensors))
            data = files[f"w{index}"][specs[0].offset :]
            span = WeightsRange(
                path=f"w{index}", offset=specs[0].offset, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()
            )
            # As they are in memory.
            weight = weight_of(array.astype(np.float32) if kind == "narrow" else array for array in tensors.values())
        made.append(
            Shard(
                name=f"s{index}",
                role="block",
                graph=_GRAPH,
                weights=span,
                tensors=tuple(specs),
                inputs=("embedded",) if index == 0 else (f"hidden.{index}",),
                outputs=("last",) if index == shards - 1 else (f"hidden.{index + 1}",),
                lookups=(lookup,) if index == 0 else (),
                packed=kind == "small" and index % 2 == 1,
                structure="s",
            )
        )
        weights.append(weight)
    shape: tuple[str, ...] = ("batch", "length")
    manifest = Manifest(
        exporter="tests",
        source="",
        model_type="simulated",
        task="",
        inputs=(TensorSpec(name="ids", dtype="int64", shape=shape),),
        outputs=(TensorSpec(name="last", dtype="int64", shape=shape),),
        edges=tuple(TensorSpec(name=f"hidden.{i}", dtype="int64", shape=shape) for i in range(1, shards)),
        files=tuple(records),
        shards=tuple(made),
        structures={"s": Structure(activations=((ByteTerm(nbytes=10),),))},
        dims=shape,
    )
    return Model(manifest, files, table, tuple(weights))


def _tensors(kind: Kind, index: int, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    sizes: Sequence[int] = {"parts": (3, 2, 2), "narrow": (1, 2)}.get(kind, (2,))
    if kind == "plain" and index % 3 == 2:
        sizes = (4,)
    found: dict[str, NDArray[Any]] = {}
    for k, pages in enumerate(sizes):
        data = random.integers(0, 256, pages * PAGE_BYTES, dtype=np.uint8)
        if kind == "narrow":
            found[f"w{index}.{k}"] = data.astype(np.float32).astype(ml_dtypes.bfloat16)
        else:
            found[f"w{index}.{k}"] = data
    return found
