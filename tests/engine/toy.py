"""Small sharded model directories, written by hand: every feature of the format, and weights of any size.

    prologue          embedded = table[input_ids]; hidden.0 = embedded @ w; mask from attention_mask
    block.000 ...     hidden.k+1 = hidden.k + tanh(hidden.k @ w + b) * mask        (a decoder adds a cached running sum)
                      with `gain`, tanh(...) * g; `common`: all blocks have the weights of the first
                      `narrow`: w and the table are bfloat16, and g float16; `rounded`: the same values in float32
                      `small`: w has 4 bits, q, with a scale for each 32 of them, s
    epilogue          an encoder's last_hidden_state; a decoder's input for its head
    head.000, .001    a decoder's head, cut along the vocabulary, tied to the table

Needs the package onnx; `tests/models.py` writes toys too, for environments that do not have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import (
    PAGE_BYTES,
    ByteTerm,
    Cache,
    FileRecord,
    Head,
    Lookup,
    Manifest,
    Shard,
    Structure,
    TensorSpec,
    WeightSpec,
    WeightsRange,
    write,
)

VOCABULARY = 96
HEAD_ROWS = (64, 32)
"""Rows of each head slice: with any width that is a multiple of 16, both begin at a page."""

Arrays = Mapping[str, NDArray[np.float32]]


def inputs(batch: int = 2, length: int = 5, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Seeded inputs for any toy; the last position of the first row is masked out when there are several rows."""
    random = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    if batch > 1:
        mask[0, -1:] = 0
    return {"input_ids": random.integers(0, VOCABULARY, (batch, length)), "attention_mask": mask}


def make_toy(
    directory: Path,
    *,
    blocks: int = 6,
    width: int = 64,
    decoder: bool = False,
    gain: bool = False,
    common: bool = False,
    narrow: bool = False,
    rounded: bool = False,
    small: bool = False,
    seed: int = 0,
) -> Path:
    """Write a toy into a new directory. A block has about `4 * width * width` bytes of weights, half that if narrow."""
    return _Toy(directory, blocks, width, decoder, gain, common, narrow, rounded, small, seed).write()


class _Toy:
    def __init__(
        self,
        directory: Path,
        blocks: int,
        width: int,
        decoder: bool,
        gain: bool,
        common: bool,
        narrow: bool,
        rounded: bool,
        small: bool,
        seed: int,
    ) -> None:
        self._directory, self._blocks, self._width = directory, blocks, width
        self._decoder, self._gain, self._common = decoder, gain, common
        self._narrow, self._rounded, self._small = narrow, rounded, small
        self._random = np.random.default_rng(seed)
        self._files: list[FileRecord] = []
        self._shards: list[Shard] = []
        (directory / "shards").mkdir(parents=True)

    def write(self) -> Path:
        width, decoder = self._width, self._decoder
        table = self._normal(VOCABULARY, width)
        tables = self._weights_file("embeddings", {"embeddings.table": table})
        lookup = Lookup(path="shards/embeddings.safetensors", table=tables[0], indices="input_ids", output="embedded")
        mask_length = "past_sequence_length + sequence_length" if decoder else "sequence_length"
        hidden = ("batch_size", "sequence_length", width)
        ids = TensorSpec(name="input_ids", dtype="int64", shape=hidden[:2])
        mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch_size", mask_length))
        edges = [
            TensorSpec(name="embedded", dtype="float32", shape=hidden),
            TensorSpec(name="mask", dtype="float32", shape=("batch_size", mask_length, 1)),
        ]
        past = [
            TensorSpec(name=f"past.{k}", dtype="float32", shape=("batch_size", "past_sequence_length", width))
            for k in range(self._blocks if decoder else 0)
        ]
        present = [
            TensorSpec(name=f"present.{k}", dtype="float32", shape=("batch_size", mask_length, width))
            for k in range(len(past))
        ]

        self._shard(
            "prologue",
            [("Cast", ["attention_mask"], ["flags"], {"to": 1}), ("Unsqueeze", ["flags", "last"], ["mask"], {}),
             ("MatMul", ["embedded", "prologue.w"], ["hidden.0"], {})],
            {"embedded": hidden, "attention_mask": mask.shape}, {"hidden.0": hidden, "mask": (*mask.shape, 1)},
            {"prologue.w": self._normal(width, width)}, lookups=(lookup,),
        )  # fmt: skip
        for k in range(self._blocks):
            edges.append(TensorSpec(name=f"hidden.{k}", dtype="float32", shape=hidden))
            nodes, takes, makes = self._block(k)
            own = self._stem(k)
            weights = {f"{own}.w": self._normal(width, width), f"{own}.b": self._normal(width)}
            if self._small:
                q = self._random.integers(0, 256, (width, width // _BLOCK, _BLOCK // 2), dtype=np.uint8)
                scales = np.abs(self._normal(*q.shape[:2])) / 4
                weights = {f"{own}.q": q, f"{own}.s": scales, f"{own}.b": weights[f"{own}.b"]}
            if self._gain:
                weights[f"{own}.g"] = self._normal(width)
            first = self._shards[1] if self._common and k else None
            borrowed = (first.weights, first.tensors) if first and first.weights else None
            self._shard(f"block.{k:03d}", nodes, takes, makes, weights, borrowed=borrowed)
        last, made = f"hidden.{self._blocks}", "normed" if decoder else "last_hidden_state"
        edges.append(TensorSpec(name=last, dtype="float32", shape=hidden))
        self._shard("epilogue", [("Mul", [last, "epilogue.scale"], [made], {})], {last: hidden}, {made: hidden},
                    {"epilogue.scale": self._normal(width)})  # fmt: skip
        head = None
        outputs = [TensorSpec(name="last_hidden_state", dtype="float32", shape=hidden)]
        if decoder:
            edges.append(TensorSpec(name="normed", dtype="float32", shape=hidden))
            head = Head(input="normed", output="logits", shards=tuple(self._head(lookup, table)))
            edges += [
                TensorSpec(name=f"logits.{k}", dtype="float32", shape=(*hidden[:2], rows))
                for k, rows in enumerate(HEAD_ROWS)
            ]
            outputs = [TensorSpec(name="logits", dtype="float32", shape=(*hidden[:2], VOCABULARY)), *present]
        manifest = Manifest(
            exporter="tests", source="toy", model_type="toy",
            task="text-generation" if decoder else "feature-extraction",
            inputs=(ids, mask, *past), outputs=tuple(outputs), edges=tuple(edges),
            caches=tuple(Cache(input=p.name, output=q.name) for p, q in zip(past, present, strict=True)),
            head=head, shards=tuple(self._shards), structures=self._structures(), files=tuple(self._files),
            dims=("batch_size", "sequence_length") + ("past_sequence_length",) * decoder,
        )  # fmt: skip
        write(manifest, self._directory)
        return self._directory

    def _stem(self, k: int) -> str:
        return f"block.{0 if self._common else k}"

    def _block(self, k: int) -> tuple[list[tuple], dict[str, tuple], dict[str, tuple]]:
        hidden = ("batch_size", "sequence_length", self._width)
        takes = {f"hidden.{k}": hidden, "mask": ("batch_size", "mask_length", 1)}
        makes = {f"hidden.{k + 1}": hidden}
        product = ("MatMul", [f"hidden.{k}", f"{self._stem(k)}.w"], ["product"], {})
        if self._small:
            sizes = {"K": self._width, "N": self._width, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
            parts = [f"hidden.{k}", f"{self._stem(k)}.q", f"{self._stem(k)}.s"]
            product = ("MatMulNBits", parts, ["product"], {"domain": "com.microsoft", **sizes})
        nodes = [
            product,
            ("Add", ["product", f"{self._stem(k)}.b"], ["biased"], {}),
            ("Tanh", ["biased"], ["squashed" if self._gain else "active"], {}),
        ]
        if self._gain:
            nodes.append(("Mul", ["squashed", f"{self._stem(k)}.g"], ["active"], {}))
        if not self._decoder:
            nodes.append(("Mul", ["active", "mask"], ["change"], {}))
        else:
            takes[f"past.{k}"] = ("batch_size", "past_sequence_length", self._width)
            makes[f"present.{k}"] = ("batch_size", "mask_length", self._width)
            nodes += [
                ("Concat", [f"past.{k}", "active"], [f"present.{k}"], {"axis": 1}),
                ("Mul", [f"present.{k}", "mask"], ["masked"], {}),
                ("CumSum", ["masked", "second"], ["sums"], {}),
                ("Shape", [f"past.{k}"], ["past_length"], {"start": 1, "end": 2}),
                ("Slice", ["sums", "past_length", "end", "second_list"], ["change"], {}),
            ]
        nodes.append(("Add", [f"hidden.{k}", "change"], [f"hidden.{k + 1}"], {}))
        return nodes, takes, makes

    def _head(self, lookup: Lookup, table: NDArray[np.float32]) -> list[str]:
        names, row = [], 0
        for k, rows in enumerate(HEAD_ROWS):
            name, weight, width = f"head.{k:03d}", f"head.{k}.rows", self._width
            part = table[row : row + rows]
            offset, data = lookup.table.offset + row * width * (2 if self._narrow else 4), self._stored(weight, part)
            spec = self._spec(weight, part, offset)
            span = WeightsRange(path=lookup.path, offset=offset, nbytes=len(data), sha256=_sha256(data))
            hidden = ("batch_size", "sequence_length", width)
            nodes = [
                ("Transpose", [weight], ["columns"], {}),
                ("MatMul", ["normed", "columns"], [f"logits.{k}"], {}),
            ]
            makes = {f"logits.{k}": (*hidden[:2], rows)}
            self._shard(name, nodes, {"normed": hidden}, makes, {}, borrowed=(span, (spec,)))
            names.append(name)
            row += rows
        return names

    def _shard(
        self,
        name: str,
        nodes: Sequence[tuple],
        takes: Mapping[str, tuple],
        makes: Mapping[str, tuple],
        weights: Arrays,
        *,
        lookups: tuple[Lookup, ...] = (),
        borrowed: tuple[WeightsRange, Sequence[WeightSpec]] | None = None,
    ) -> None:
        if borrowed:
            span, tensors = borrowed
        else:
            tensors = self._weights_file(name, weights)
            data = b"".join(self._stored(*item) for item in weights.items())
            path = f"shards/{name}.safetensors"
            span = WeightsRange(path=path, offset=tensors[0].offset, nbytes=len(data), sha256=_sha256(data))
        graph = _graph(name, nodes, takes, makes, tensors, Path(span.path).name)
        role = name.split(".")[0]
        self._shards.append(
            Shard(
                name=name,
                role=role,
                graph=self._file(f"shards/{name}.onnx", graph),
                weights=span,
                tensors=tuple(tensors),
                inputs=tuple(takes),
                outputs=tuple(makes),
                lookups=lookups,
                packed=any(op == "MatMulNBits" for op, *_ in nodes),
                structure=role,
            )
        )

    def _structures(self) -> dict[str, Structure]:
        row = 4 * self._width * (7 if self._decoder else 5)
        terms = [ByteTerm(nbytes=row, dims=("batch_size", "sequence_length"))]
        if self._decoder:
            terms.append(ByteTerm(nbytes=row, dims=("batch_size", "past_sequence_length")))
        roles = {shard.structure for shard in self._shards}
        # A head slice transposes its rows on each run.
        extra = {"head": [ByteTerm(nbytes=4 * self._width * max(HEAD_ROWS))]}
        return {role: Structure(activations=((*terms, *extra.get(role, [])),)) for role in sorted(roles)}

    def _weights_file(self, name: str, weights: Arrays) -> list[WeightSpec]:
        header, begins = {}, [0]
        for key, array in weights.items():
            begins.append(begins[-1] + len(self._stored(key, array)))
            dtype = _SAFETENSORS[self._dtype(key)]
            header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": begins[-2:]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        data = b"".join(self._stored(*item) for item in weights.items())
        self._file(f"shards/{name}.safetensors", len(text).to_bytes(8, "little") + text + data)
        return [
            self._spec(key, array, 8 + len(text) + begin)
            for (key, array), begin in zip(weights.items(), begins, strict=False)
        ]

    def _spec(self, key: str, array: NDArray[np.float32], offset: int) -> WeightSpec:
        dtype = self._dtype(key)
        widened = f"{key}.wide" if dtype.endswith("16") else None
        return WeightSpec(name=key, dtype=dtype, shape=array.shape, offset=offset, widened=widened)

    def _dtype(self, key: str) -> str:
        last = key.rsplit(".", 1)[-1]
        return "uint8" if last == "q" else _ROUNDED.get(last, "float32") if self._narrow else "float32"

    def _stored(self, key: str, array: NDArray[np.float32]) -> bytes:
        import ml_dtypes  # comes with onnx

        kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
        kind = kinds.get(_ROUNDED.get(key.rsplit(".", 1)[-1], ""))
        if kind is None or not (self._narrow or self._rounded):
            return array.tobytes()
        rounded = array.astype(kind)
        return rounded.tobytes() if self._narrow else rounded.astype(np.float32).tobytes()

    def _file(self, path: str, data: bytes) -> FileRecord:
        (self._directory / path).write_bytes(data)
        record = FileRecord(path=path, nbytes=len(data), sha256=_sha256(data))
        self._files.append(record)
        return record

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return (self._random.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1]) ** 0.5).astype(np.float32)


_GRAPH_BYTES = 12_000
_ROUNDED = {"w": "bfloat16", "table": "bfloat16", "rows": "bfloat16", "g": "float16"}
"""Last part of a tensor's name -> its type in a narrow toy."""
_BLOCK = 32
_SAFETENSORS = {"uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _graph(
    name: str,
    nodes: Sequence[tuple],
    takes: Mapping[str, tuple],
    makes: Mapping[str, tuple],
    tensors: Sequence[WeightSpec],
    location: str,
) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    def value(key: str, shape: tuple) -> onnx.ValueInfoProto:
        dtype = TensorProto.INT64 if key == "attention_mask" else TensorProto.FLOAT
        return helper.make_tensor_value_info(key, dtype, shape)

    used = {key for _, args, _, _ in nodes for key in args}
    constants = {"last": [2], "second_list": [1], "end": [2**31]}
    small = [helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in constants.items() if k in used]
    small += [helper.make_tensor("second", TensorProto.INT64, [], [1])] if "second" in used else []
    numbers = {
        "uint8": TensorProto.UINT8,
        "float32": TensorProto.FLOAT,
        "bfloat16": TensorProto.BFLOAT16,
        "float16": TensorProto.FLOAT16,
    }
    wide = {spec.name: spec.widened for spec in tensors if spec.widened}
    casts = [("Cast", [key], [made], {"to": TensorProto.FLOAT}) for key, made in wide.items()]
    nodes = [*casts, *((op, [wide.get(key, key) for key in args], *rest) for op, args, *rest in nodes)]
    for spec in tensors:
        tensor = TensorProto(name=spec.name, data_type=numbers[spec.dtype], dims=spec.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", location), ("offset", spec.offset), ("length", spec.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        small.append(tensor)
    graph = helper.make_graph(
        [helper.make_node(op, args, results, **attributes) for op, args, results, attributes in nodes],
        name,
        [value(*item) for item in takes.items()],
        [value(*item) for item in makes.items()],
        small,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    # As large as the graph of a real block, since plans take a session's memory from that.
    model.doc_string = "x" * _GRAPH_BYTES
    return bytes(model.SerializeToString())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
