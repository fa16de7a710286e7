"""`--keep` leaves shards as they are, `--mixed` finds those to keep, and each shard's own error is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.exporter.conftest import Sharded
from tests.exporter.graphs import WIDTH, encoder

from pipeload.cli.report import accuracy_report
from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import Manifest, SmallWeights, read
from pipeload_export import convert, export
from pipeload_export.check.accuracy import accuracy_cases, with_no_past
from pipeload_export.check.shard_errors import Units, compare_shards
from pipeload_export.convert.how import limit_of
from pipeload_export.convert.rounding import round_directory
from pipeload_export.graph.load import load


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An encoder whose second block has a product with a few weights that are a hundred times the others."""
    model = encoder(layers=3).model()
    widening = [t for t in model.graph.initializer if tuple(t.dims) == (WIDTH, 2 * WIDTH)]
    values = onnx.numpy_helper.to_array(widening[1]).copy()
    values[::8, ::8] *= 100
    widening[1].raw_data = values.tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    export(tmp_path / "model.onnx", tmp_path / "floats", task="feature-extraction")
    return tmp_path / "floats"


def errors(manifest: Manifest) -> dict[str, float]:
    assert manifest.small_weights
    assert manifest.small_weights.accuracy
    return {one.shard: one.max_rel_error for one in manifest.small_weights.accuracy.shards}


def worst(manifest: Manifest) -> float:
    assert manifest.small_weights
    assert manifest.small_weights.accuracy
    return max(one.max_rel_error for one in manifest.small_weights.accuracy.outputs)


def product_bits(folder: Path, manifest: Manifest, name: str) -> Counter[int]:
    """The bits of a shard's products; 32 where they take floats."""
    path = folder / next(shard.graph.path for shard in manifest.shards if shard.name == name)
    found: Counter[int] = Counter()
    graph = load(path)
    for node in graph.nodes:
        if node.op_type == "MatMulNBits":
            found[next(item.i for item in node.attribute if item.name == "bits")] += 1
        elif node.op_type in ("MatMul", "Gemm", "FusedMatMul") and node.input[1] in graph.constants:
            found[32] += 1
    return found


def test_the_error_of_a_shard_is_what_its_own_rounding_does(directory: Path, tmp_path: Path) -> None:
    made = convert(directory, tmp_path / "four", weights="int4")
    found = errors(made)
    assert list(found) == [shard.name for shard in made.shards]
    assert found["block.002"] > 0
    # With all but one shard as they were, the output of the last one has the error of that one.
    names = [name for name in found if name != "block.002"]
    alone = convert(directory, tmp_path / "alone", weights="int4", keep=f"fp32:{','.join(names)}")
    assert errors(alone) == {**dict.fromkeys(names, 0.0), "block.002": pytest.approx(found["block.002"])}
    assert accuracy_report(made.small_weights).count("block.") == 3  # type: ignore[arg-type]


def test_kept_shards_have_the_bits_that_were_asked_for(directory: Path, tmp_path: Path) -> None:
    keep = ["fp32:block.000", "int8:block.001"]
    made = convert(directory, tmp_path / "made", weights="int4", keep=keep)
    assert made == read(tmp_path / "made")
    assert made.small_weights
    assert made.small_weights.kept == {"block.000": "fp32", "block.001": "int8"}
    bits = {name: product_bits(tmp_path / "made", made, name) for name in ("block.000", "block.001", "block.002")}
    assert set(bits["block.000"]) == {32}
    assert set(bits["block.001"]) == {8}
    assert set(bits["block.002"]) == {4, 8}
    source = {shard.name: shard for shard in read(directory).shards}
    assert next(s for s in made.shards if s.name == "block.000").weights == source["block.000"].weights
    report = accuracy_report(made.small_weights)
    assert "wider, fp32: block.000" in report
    assert "wider, int8: block.001" in report


def test_a_tied_table_is_kept_with_any_shard_that_takes_it(
    sharded_architecture: Callable[[str], Sharded], tmp_path: Path
) -> None:
    found = sharded_architecture("gpt2")
    small = SmallWeights(bits=4, fine_bits=8, block_size=32, symmetric=True)
    (tmp_path / "made").mkdir()
    made = round_directory(found.directory, tmp_path / "made", small, kept={"head": "fp32"}, progress=lambda *_: None)
    tables = {lookup.table.name: lookup for shard in made.shards for lookup in shard.lookups}
    slices = [shard for shard in made.shards if shard.role == "head"]
    tied = next(one for one in tables.values() if one.path == slices[0].weights.path and one.table.shape[0] == 1000)  # type: ignore[union-attr]
    assert (tied.table.dtype, tied.parts) == ("float32", ())
    assert not any(shard.packed for shard in slices)
    assert any(shard.packed for shard in made.shards)
    states = with_no_past(found.manifest, accuracy_cases(found.directory, found.manifest), unsplit=False)
    units = Units(found.directory, found.manifest), Units(tmp_path / "made", made)
    _, own = compare_shards(*units, states, lambda *_: None)
    assert own[-1].shard == "head"
    assert own[-1].max_rel_error == 0
    assert max(one.max_rel_error for one in own) > 0


def test_mixed_keeps_the_fewest_of_the_worst(directory: Path, tmp_path: Path) -> None:
    narrow = convert(directory, tmp_path / "narrow", weights="int4")
    limit = worst(narrow) / 2
    made = convert(directory, tmp_path / "made", weights="int4", mixed=limit)
    assert made == read(tmp_path / "made")
    assert worst(made) <= limit
    assert made.small_weights
    ranked = sorted(errors(narrow), key=lambda name: -errors(narrow)[name])
    kept = list(made.small_weights.kept)
    assert kept == ranked[: len(kept)]
    assert 0 < len(kept) < 3
    fewer = convert(
        directory, tmp_path / "fewer", weights="int4", keep=[f"int8:{','.join(kept[:-1])}"] if kept[1:] else ()
    )
    assert worst(fewer) > limit


def test_mixed_goes_on_to_floats_where_8_bits_are_not_enough(directory: Path, tmp_path: Path) -> None:
    eight = convert(directory, tmp_path / "eight", weights="int4", keep="int8:block.000,block.001,block.002")
    made = convert(directory, tmp_path / "made", weights="int4", mixed=worst(eight) / 2)
    assert worst(made) <= worst(eight) / 2
    assert made.small_weights
    assert "fp32" in made.small_weights.kept.values()


def test_an_error_that_only_floats_have_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Whichever shards are kept wider.*--mixed"):
        convert(directory, tmp_path / "made", weights="int8", mixed=1e-7)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("mixed", "limit"), [("0.5%", 0.005), ("0.005", 0.005), (0.01, 0.01), ("5 %", 0.05)])
def test_the_limit_is_a_part_or_a_percentage(mixed: Any, limit: float) -> None:
    assert limit_of(mixed) == pytest.approx(limit)


@pytest.mark.parametrize("mixed", ["0", "much", "100%", -1, "nan"])
def test_other_limits_are_refused(mixed: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no error in parts"):
        convert(tmp_path, tmp_path / "made", weights="int8", mixed=mixed)


def test_unknown_shards_are_named_once_with_those_that_exist(directory: Path, tmp_path: Path) -> None:
    known = "prologue, block.000, block.001, block.002"
    with pytest.raises(ConfigError, match=rf"no shard 'block.7', 'tail'\. Its shards are: {known}"):
        convert(directory, tmp_path / "made", weights="int8", keep="fp32:block.7,block.000,tail")
    source = directory.with_name("model.onnx")
    with pytest.raises(ConfigError, match=rf"no shard 'block.7'\. Its shards are: {known}"):
        export(source, tmp_path / "made", task="feature-extraction", weights="int8", keep="fp32:block.7")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int8", "keep": "int8:block.000"}, "Pass fp32:SHARD,SHARD"),
        ({"weights": "int4", "keep": "block.000"}, "Pass fp32:SHARD,SHARD or int8:SHARD,SHARD"),
        ({"weights": "int4", "keep": ["fp32:a", "int8:a"]}, "'a' as fp32 and as int8"),
        ({"weights": "int4", "mixed": 0.1, "verify": False}, "leave --mixed out"),
        ({"weights": "int3"}, "take one of bf16, fp16, int8, int4"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path / "absent", tmp_path / "made", **options)


def test_all_shards_kept_leave_nothing_to_round(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is left to be rounded"):
        convert(directory, tmp_path / "made", weights="int8", keep="fp32:prologue,block.000,block.001,block.002")
