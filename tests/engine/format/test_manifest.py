"""The manifest is read back as it was written, and whatever is wrong with it is said, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeload.errors import ConfigError, ManifestError
from pipeload.format import manifest as manifests
from pipeload.format.dtypes import ITEM_BYTES
from pipeload.format.manifest import MANIFEST_NAME, ByteTerm, Manifest, Structure, TensorSpec, bind_dims, evaluate_dim
from pipeload.format.records import Accuracy, OutputError, SmallWeights


def _tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=shape)


@pytest.fixture
def edited(toy_copy: Path) -> Callable[[Callable[[Any], Any]], Path]:
    """Changes the manifest's JSON of a toy; gives the directory."""

    def edit(change: Callable[[Any], Any]) -> Path:
        path = toy_copy / MANIFEST_NAME
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return toy_copy

    return edit


# Round trip


def test_what_is_written_is_read_back(any_toy: Path, tmp_path: Path) -> None:
    manifest = manifests.read(any_toy)
    assert manifests.write(manifest, tmp_path) == tmp_path / MANIFEST_NAME
    assert manifests.read(tmp_path) == manifest
    assert (tmp_path / MANIFEST_NAME).read_bytes() == (any_toy / MANIFEST_NAME).read_bytes()


def test_exported_manifests_are_read_back(exported: Path, tmp_path: Path) -> None:
    manifest = manifests.read(exported)
    manifests.write(manifest, tmp_path)
    assert manifests.read(tmp_path) == manifest


def test_an_inconsistent_manifest_is_not_written(toy: Path, tmp_path: Path) -> None:
    manifest = replace(manifests.read(toy), shards=())
    with pytest.raises(ManifestError, match="no shards"):
        manifests.write(manifest, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["cosine", "top1", "perplexity", "source_perplexity", "max_abs_error"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_accuracy_that_is_no_number_is_not_written(toy: Path, tmp_path: Path, field: str, number: float) -> None:
    """In JSON it would be null."""

    def manifest_with(number: float) -> Manifest:
        error = OutputError(output="x", max_abs_error=1.0, mean_abs_error=0.5, max_rel_error=0.1)
        found: dict[str, Any] = {"inputs": (), "outputs": (error,)}
        found |= {"outputs": (replace(error, max_abs_error=number),)} if field == "max_abs_error" else {field: number}
        weights = SmallWeights(bits=8, fine_bits=8, block_size=32, symmetric=True, accuracy=Accuracy(**found))
        return replace(manifests.read(toy), small_weights=weights)

    with pytest.raises(ManifestError, match="the accuracy of its weights is no number"):
        manifests.write(manifest_with(number), tmp_path)
    assert not list(tmp_path.iterdir())
    manifests.write(manifest_with(0.5), tmp_path)
    assert manifests.read(tmp_path) == manifest_with(0.5)


def test_the_fields_are_pinned() -> None:
    # A new field needs a default, or format 2: manifests of today must stay readable.
    required = {
        "exporter",
        "source",
        "model_type",
        "task",
        "inputs",
        "outputs",
        "edges",
        "shards",
        "structures",
        "files",
    }
    optional = {
        "format",
        "caches",
        "head",
        "verification",
        "parity",
        "dims",
        "quantised_dynamically",
        "takes_left_padding",
        "rope_change",
        "small_weights",
        "draft",
        "missing_weights",
        "unused_weights",
    }
    assert {field.name for field in fields(Manifest)} == required | optional


def test_fields_of_a_later_minor_version_are_ignored(edited: Any) -> None:
    manifests.read(edited(lambda content: content.update(something_new={"a": 1})))


# Files that are no manifests


def test_a_directory_without_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is not a sharded model directory.*pipeload export"):
        manifests.read(tmp_path)
    with pytest.raises(ManifestError, match="does not exist"):
        manifests.read(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ManifestError, match=r"model\.onnx is no directory\. Pass the directory"):
        manifests.read(tmp_path / "model.onnx")


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        manifests.read(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 10**30, -1])
def test_other_versions_are_refused_with_the_version(edited: Any, version: int) -> None:
    # Whatever else that version changes: only the number counts.
    directory = edited(lambda content: (content.clear(), content.update(format=version)))
    with pytest.raises(ManifestError, match=rf"has format {version}; this pipeload reads format 1"):
        manifests.read(directory)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 100,
        b"not json",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 1',
        b'{"format": 1}',
        b'{"format": "1"}',
        b'{"format": true}',
        b'{"format": 1, "exporter": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"format": 1, "x": ' + b'{"a":' * 100_000,
        b'{"format": 1, "shards": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": 1e400}',
    ],
)
def test_garbage_is_called_damaged(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(garbage)
    with pytest.raises(ManifestError, match="is damaged"):
        manifests.read(tmp_path)


def test_a_manifest_cut_anywhere_is_called_damaged(toy_copy: Path) -> None:
    path = toy_copy / MANIFEST_NAME
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 997):
        path.write_bytes(content[:length])
        with pytest.raises(ManifestError):
            manifests.read(toy_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("inputs", None), ("shards", {}), ("dims", [1]), ("structures", []), ("files", [{"path": "a"}]), ("task", 3)],
)
def test_a_field_of_the_wrong_type_is_named(edited: Any, field: str, value: Any) -> None:
    with pytest.raises(ManifestError, match=field):
        manifests.read(edited(lambda content: content.update({field: value})))


# Faults


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def _parts(rows: tuple[int, ...], width: int = 64, offset: int = 4096, dtype: str = "float32") -> Callable[[Any], None]:
    """The first table in parts of so many rows."""

    def change(content: Any) -> None:
        content["shards"][0]["lookups"][0]["parts"] = [
            {"name": f"part.{count}", "dtype": dtype, "shape": [count, width], "offset": offset} for count in rows
        ]

    return change


_FAULTS = [
    (_set("shards", to=[]), "lists no shards"),
    (_set("shards", 1, "name", to="prologue"), "shard 'prologue' occurs twice"),
    (_set("inputs", 1, "name", to="input_ids"), "input 'input_ids' occurs twice"),
    (_set("files", 1, "path", to="shards/embeddings.safetensors"), "occurs twice"),
    (_set("inputs", 0, "dtype", to="float8"), "unknown dtype 'float8'"),
    (_set("inputs", 0, "shape", to=["batch_size", "unheard_of"]), "'input_ids'.*unheard_of"),
    (_set("edges", 0, "shape", to=["batch_size", "unheard_of", 64]), "'embedded'.*unheard_of"),
    (_set("inputs", 0, "shape", to=["batch_size", -1]), "'input_ids'"),
    (_set("inputs", 0, "shape", to=["batch_size", "sequence_length + "]), "'input_ids'"),
    (_set("files", 0, "nbytes", to=-1), "no valid size and sha256"),
    (_set("files", 0, "sha256", to="0123"), "no valid size and sha256"),
    (_set("files", 0, "sha256", to="g" * 64), "no valid size and sha256"),
    (_set("shards", 2, "inputs", to=["hidden.9", "mask"]), "takes 'hidden.9', which nothing before it makes"),
    (_set("shards", 0, "lookups", 0, "indices", to="ids"), "takes 'ids', which nothing before it makes"),
    (_set("shards", 2, "structure", to="other"), "unknown structure 'other'"),
    (_set("structures", "block", "activations", 0, 0, "dims", to=["height"]), r"unknown dimensions \['height'\]"),
    (_set("structures", "block", "activations", 0, 0, "nbytes", to=-5), "structure 'block'"),
    (_set("shards", 2, "graph", "nbytes", to=1), "graph 'shards/block.001.onnx'.* is not in the list of files"),
    (_set("shards", 2, "weights", to=None), "'block.001' has tensors, but no weights"),
    (_set("shards", 2, "weights", "path", to="shards/other"), "'shards/other' .* not in the list of files"),
    (_set("shards", 2, "weights", "nbytes", to=10**9), "weights of shard 'block.001' end at byte"),
    (_set("shards", 2, "weights", "nbytes", to=-1), "weights of shard 'block.001'"),
    (_set("shards", 2, "weights", "offset", to=-4096), "weights of shard 'block.001'"),
    (_set("shards", 2, "weights", "offset", to=4100), "no multiple of 4096"),
    (_set("shards", 2, "weights", "sha256", to="x"), "'block.001'"),
    (_set("shards", 2, "tensors", 0, "dtype", to="float8"), "no valid dtype and shape"),
    (_set("shards", 2, "tensors", 0, "shape", to=[-1, 64]), "no valid dtype and shape"),
    (_set("shards", 2, "tensors", 0, "offset", to=0), "lies outside the shard's weights"),
    (_set("shards", 2, "tensors", 0, "shape", to=[64, 6400]), "lies outside the shard's weights"),
    (_set("shards", 2, "tensors", 0, "shape", to=[2**40, 2**40]), "lies outside the shard's weights"),
    (_set("shards", 2, "tensors", 1, "offset", to=20478), "is not aligned"),
    (_set("shards", 0, "lookups", 0, "table", "shape", to=[]), "no valid dtype and shape"),
    (_set("shards", 0, "lookups", 0, "table", "shape", to=[97, 64]), "lies outside"),
    (_parts(rows=(50, 40)), "the parts of table .* have 90 rows of 96"),
    (_parts(rows=(50, 46), width=32), "part .* has rows of another size"),
    (_parts(rows=(50, 46), offset=1 << 40), "part .* lies outside"),
    (_parts(rows=(50, 46), dtype="int8"), "part .* has no valid dtype and shape"),
    (_set("small_weights", to={"bits": 0, "fine_bits": 8, "block_size": 32, "symmetric": True}), "weights of 0 and 8"),
    (_set("shards", 0, "lookups", 0, "path", to="shards/other"), "lies outside 'shards/other'"),
    (_set("outputs", 0, "name", to="logits"), "output 'logits' is made by no shard"),
    (_set("outputs", 0, "name", to="input_ids"), "output 'input_ids' is made by no shard"),
    (_set("caches", to=[{"input": "past", "output": "present"}]), "cache input 'past' is no input"),
    (_set("caches", to=[{"input": "input_ids", "output": "last_hidden_state"}]), "differ in dtype or rank"),
    (_set("caches", to=[{"input": "past", "output": "present"}]), "cache output 'present' is no output"),
    (
        _set("caches", to=[{"input": "past", "output": "present", "in_place": True, "scale": "other"}]),
        "cache 'past' has the scales 'other', and not both are caches in place",
    ),
    (
        _set("head", to={"input": "hidden.6", "output": "logits", "shards": ["epilogue", "head.000"]}),
        "head slice 'head.000' is not a shard",
    ),
    (_set("head", to={"input": "hidden.6", "output": "logits", "shards": []}), "'logits', which is no output"),
    (
        _set("structures", "block", "activations", 0, 0, "steps", to=[1] * 9),
        "another number of steps than of dimensions",
    ),
    (_set("structures", "block", "activations", 0, 0, "steps", to=[0]), "a step that is not between 1 and"),
]


@pytest.mark.parametrize(("change", "words"), _FAULTS, ids=[words[:40] for _, words in _FAULTS])
def test_each_inconsistency_is_named(edited: Any, change: Callable[[Any], None], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        manifests.read(edited(change))


def test_all_faults_are_listed_at_once(edited: Any) -> None:
    chosen = [_FAULTS[k] for k in (1, 4, 9, 12, 20, 23)]
    with pytest.raises(ManifestError) as caught:
        manifests.read(edited(lambda content: [change(content) for change, _ in chosen]))
    message = str(caught.value)
    for _, words in chosen:
        assert words in message
    assert "Export the model again" in message


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../other/x.onnx", "shards/../../x", "", "shards\\..\\x", "shards/\0x", ".."]
)
def test_paths_out_of_the_directory_are_refused(edited: Any, path: str) -> None:
    with pytest.raises(ManifestError, match="is not inside the model directory"):
        manifests.read(edited(_set("files", 0, "path", to=path)))


# Sizes


def test_symbols_are_bound_by_the_shapes() -> None:
    specs = [_tensor("ids", "batch", "length"), _tensor("image", "batch", 3, "height")]
    assert bind_dims(specs, {"ids": (2, 7), "image": (2, 3, 9)}) == {"batch": 2, "length": 7, "height": 9}


def test_a_symbol_inside_a_sum_is_solved() -> None:
    specs = [_tensor("mask", "batch", "past + length"), _tensor("ids", "batch", "length")]
    assert bind_dims(specs, {"ids": (1, 3), "mask": (1, 10)}) == {"batch": 1, "length": 3, "past": 7}
    assert bind_dims([_tensor("x", "n + n + 2")], {"x": (8,)}) == {"n": 3}


def test_sums_are_solved_in_whatever_order_they_come() -> None:
    specs = [_tensor("x", "a + b"), _tensor("y", "b + c"), _tensor("z", "c")]
    assert bind_dims(specs, {"x": (6,), "y": (5,), "z": (2,)}) == {"a": 3, "b": 3, "c": 2}


def test_a_sum_of_two_symbols_that_nothing_else_binds_binds_none_and_is_no_contradiction() -> None:
    specs = [_tensor("mask", "past + length"), _tensor("ids", "batch")]
    assert bind_dims(specs, {"mask": (6,), "ids": (2,)}) == {"batch": 2}


def test_inputs_that_were_left_out_bind_nothing() -> None:
    assert bind_dims([_tensor("ids", "batch"), _tensor("past", "past")], {"ids": (2,)}) == {"batch": 2}


def test_all_shape_faults_are_listed_at_once() -> None:
    specs = [_tensor("ids", "batch", "length"), _tensor("mask", "batch", "length"), _tensor("image", "batch", 3)]
    with pytest.raises(ConfigError) as caught:
        bind_dims(specs, {"ids": (2, 7), "mask": (3, 7), "image": (2, 4, 1)})
    assert "'mask' has size 3 where the model takes batch = 2" in str(caught.value)
    assert "'image' has 3 dimensions" in str(caught.value)


@pytest.mark.parametrize("size", [2, 0])
def test_a_sum_that_is_too_small_for_its_parts_is_a_contradiction(size: int) -> None:
    specs = [_tensor("ids", "length"), _tensor("mask", "past + length")]
    with pytest.raises(ConfigError, match=f"'mask' has size {size} where the model takes past"):
        bind_dims(specs, {"ids": (3,), "mask": (size,)})


def test_a_sum_with_no_whole_solution_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="'x' has size 5 where the model takes"):
        bind_dims([_tensor("x", "n + n")], {"x": (5,)})


def test_dimensions_are_evaluated() -> None:
    assert evaluate_dim(5, {}) == 5
    assert evaluate_dim("past + length + 1", {"past": 2, "length": 3}) == 6
    with pytest.raises(KeyError, match="past"):
        evaluate_dim("past", {})


def test_activation_bytes_are_the_worst_formula() -> None:
    formulas = ((ByteTerm(nbytes=4, dims=("n", "n")), ByteTerm(nbytes=100)), (ByteTerm(nbytes=50, dims=("n",)),))
    structure = Structure(activations=formulas)
    assert structure.activation_bytes({"n": 2}) == 116
    assert structure.activation_bytes({"n": 10}) == 500
    assert structure.activation_bytes({"n": 100}) == 40_100
    assert Structure(activations=()).activation_bytes({}) == 0


def test_a_dimension_may_count_in_steps_of_which_a_part_is_a_whole_one() -> None:
    term = ByteTerm(nbytes=10, dims=("b", "h", "h"), steps=(1, 14, 14))
    structure = Structure(activations=((term,),))
    assert structure.activation_bytes({"b": 2, "h": 28}) == 80
    assert structure.activation_bytes({"b": 2, "h": 29}) == 180


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES.keys() - {"bfloat16"}))
def test_element_sizes_are_those_of_numpy(dtype: str) -> None:
    assert manifests.dtype_bytes(dtype) == np.dtype(dtype).itemsize
    assert manifests.dtype_bytes("bfloat16") == 2
