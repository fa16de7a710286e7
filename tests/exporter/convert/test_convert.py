"""`convert`: the same bits as rounding the unsplit graph gives, bounds of the rounded graphs, files stored once."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import encoder, write_rounded_graph
from tests.marks import slow

import pipeload
from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import Manifest, SmallWeights, read
from pipeload_export import convert, export, verify
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_shards
from pipeload_export.convert.rounding import round_directory
from pipeload_export.convert.sharing import share_equal_files
from pipeload_export.graph.load import load
from pipeload_export.rewrite.rounding import Rounding

EIGHT, FOUR = Rounding(bits=8, block_size=32), Rounding(bits=4, block_size=32)
SIZES = {"batch": 2, "length": 7, "num_channels": 3, "height": 32, "width": 32}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small encoder's directory, with weights as they are."""
    export(encoder(layers=3).save(tmp_path / "model.onnx"), tmp_path / "floats", task="feature-extraction")
    return tmp_path / "floats"


def small(bits: int) -> SmallWeights:
    return SmallWeights(bits=bits, fine_bits=8, block_size=32, symmetric=True)


def rounded_tensors(path: Path) -> Counter[str]:
    """Hashes of all matrices of bytes that a graph takes."""
    constants = load(path).constants.values()
    small_types = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    return Counter(
        hashlib.sha256(np.ascontiguousarray(one.load()).tobytes()).hexdigest()
        for one in constants
        if one.dtype in small_types and one.nbytes >= 1024
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "name",
    ["bert", "gpt2", "bert-masked", slow("roberta"), slow("vit"), slow("bloom"), slow("gptj"), slow("llama")],
)
def test_shards_have_the_bits_and_answers_of_the_unsplit_graph_rounded_as_a_whole(
    name: str,
    bits: int,
    architecture: Callable[[str], Path],
    sharded_architecture: Callable[[str], Sharded],
    shard: Callable[..., Sharded],
    tmp_path: Path,
) -> None:
    floats, takes_past = sharded_architecture(name), "past" in str(sharded_architecture(name).model.inputs)
    coarse = EIGHT if bits == 8 else FOUR
    whole = write_rounded_graph(
        architecture(name), tmp_path / "whole", coarse, EIGHT, integers=bits == 8 and not takes_past
    )
    wanted = shard(whole)
    (tmp_path / "made").mkdir()
    made = round_directory(floats.directory, tmp_path / "made", small(bits), progress=lambda *_: None)
    assert [one.name for one in made.shards if one.role != "head"] == [
        one.name for one in floats.model.shards if one.role != "head"
    ]
    found = [rounded_tensors(tmp_path / "made" / one.graph.path) for one in made.shards]
    known = [rounded_tensors(wanted.directory / one.graph.path) for one in wanted.model.shards]
    assert sum(found, Counter[str]()) == sum(known, Counter[str]())
    # What is large beside a block depends on the bits: the unsplit graph's other parts may be cut at other places.
    blocks, others = ([one for one in shards if one.role == "block"] for shards in (made.shards, wanted.model.shards))
    for one, other in zip(blocks, others, strict=True):
        assert (one.nbytes, one.packed) == (other.nbytes, other.packed)
    assert made.dims == wanted.model.dims
    assert (made.inputs, made.outputs, made.caches) == (floats.model.inputs, floats.model.outputs, floats.model.caches)
    inputs = wanted.inputs({symbol: SIZES.get(symbol, 2) for symbol in made.dims})
    answers = run_shards(tmp_path / "made", made, [Case(name="test", inputs=inputs)], lambda *_: None)[0]
    assert_same_answers(wanted.run(inputs), answers, 1e-4)


def test_bounds_are_those_of_the_rounded_graphs(
    sharded_architecture: Callable[[str], Sharded], shard: Callable[..., Sharded], architecture: Any, tmp_path: Path
) -> None:
    # Products of integers hold halves of activations and two products: more than products of floats.
    floats = sharded_architecture("bert")
    made = round_directory(floats.directory, tmp_path, small(8), progress=lambda *_: None)
    whole = shard(write_rounded_graph(architecture("bert"), tmp_path / "whole", EIGHT, EIGHT, integers=True))
    sizes = dict.fromkeys(made.dims, 16)

    def bound(manifest: Any) -> int:
        block = next(one for one in manifest.shards if one.role == "block")
        return int(manifest.structures[block.structure].activation_bytes(sizes))

    assert bound(made) > bound(floats.model)
    assert bound(made) == pytest.approx(bound(whole.model), rel=0.1)


def test_files_in_common_are_the_same_files_and_each_directory_stands_alone(directory: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    made = convert(directory, tmp_path / "eight", weights="int8", keep="fp32:block.001")
    source = {record.sha256: record.path for record in read(directory).files}
    shared = {record.path: source[record.sha256] for record in made.files if record.sha256 in source}
    weights = {path for path in shared if path.endswith(".safetensors")}
    assert "shards/block.001.safetensors" in weights
    for path in shared.keys() - weights:
        assert (tmp_path / "eight" / path).samefile(directory / shared[path])
    for path in weights:
        # onnx refuses external data with a second name. A second name in the cache is no matter.
        assert (tmp_path / "eight" / path).stat().st_nlink == 1
        onnx.checker.check_model(str((directory / path).with_suffix(".onnx")))
    assert {path: path.read_bytes() for path in before} == before
    verify(directory)
    for path in before:
        path.unlink()
    verify(tmp_path / "eight")
    with pipeload.load(tmp_path / "eight", "1GB") as model:
        assert model.run({name: np.ones((1, 3), np.int64) for name in ("input_ids", "attention_mask")})


def test_weights_of_equal_size_and_header_with_other_values_are_not_shared(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a weights file leaves out the ranges of its shards."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    manifest = read(other)
    block = next(one for one in manifest.shards if one.name == "block.001")
    assert block.weights is not None
    path = other / block.weights.path
    data = bytearray(path.read_bytes())
    data[block.weights.offset] ^= 1
    path.write_bytes(data)
    sha256 = hashlib.sha256(data[block.weights.offset :]).hexdigest()
    changed = replace(block, weights=replace(block.weights, sha256=sha256))
    shards = tuple(changed if one is block else one for one in manifest.shards)
    manifest = replace(manifest, shards=shards)
    cloned: list[str] = []

    def clone(descriptor: int, _: int, known: int) -> None:
        os.sendfile(descriptor, known, 0, 1 << 30)
        cloned.append(Path(f"/proc/self/fd/{known}").readlink().name)

    monkeypatch.setattr("fcntl.ioctl", clone)
    share_equal_files(directory, read(directory), other, manifest)
    assert path.read_bytes() == bytes(data)
    same = {record.path for record in manifest.files if (other / record.path).samefile(directory / record.path)}
    same |= {record.path for record in manifest.files if Path(record.path).name in cloned}
    assert same == {record.path for record in manifest.files} - {block.weights.path}


def test_without_hard_links_files_are_copied(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    convert(directory, tmp_path / "eight", weights="int8", keep="fp32:block.001")
    verify(tmp_path / "eight")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "eight").rglob("*") if path.is_file())


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_sixteen_bits_are_stored_as_sixteen_bits(directory: Path, tmp_path: Path, weights: Any) -> None:
    made = convert(directory, tmp_path / "made", weights=weights)
    assert made == read(tmp_path / "made")
    tables = [lookup.table for one in made.shards for lookup in one.lookups]
    assert {table.dtype for table in tables} == {"bfloat16" if weights == "bf16" else "float16"}


def test_rounded_weights_are_not_rounded_again(directory: Path, tmp_path: Path) -> None:
    convert(directory, tmp_path / "eight", weights="int8", verify=False)
    with pytest.raises(ConfigError, match=r"are rounded to 8 bits.*--weights fp32"):
        convert(tmp_path / "eight", tmp_path / "four", weights="int4")


def test_the_directory_itself_is_no_target(directory: Path) -> None:
    with pytest.raises(ConfigError, match="Name another"):
        convert(directory, directory, weights="int8", force=True)
    verify(directory)


def test_too_large_an_error_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--max-error allows 1e-06"):
        convert(directory, tmp_path / "made", weights="int4", max_error=1e-6)
    assert not (tmp_path / "made").exists()


def test_an_export_is_a_directory_of_floats_that_is_converted(directory: Path, tmp_path: Path) -> None:
    made = convert(directory, tmp_path / "converted", weights="int4")
    exported = export(tmp_path / "model.onnx", tmp_path / "exported", task="feature-extraction", weights="int4")

    def facts(manifest: Manifest) -> Any:
        return manifest.shards, manifest.structures, manifest.files, manifest.small_weights

    assert facts(made) == facts(exported)
