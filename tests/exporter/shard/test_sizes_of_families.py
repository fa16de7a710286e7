"""Families whose inputs have sizes that belong together export, and plans know the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.exporter.shard.families import write_family
from tests.marks import slow, survey
from tests.shared import folder_of_the_run, made_by_one

from pipeload.errors import ExportError
from pipeload.format.caches import length_input
from pipeload.format.manifest import Manifest, evaluate_dim, read
from pipeload.pipeline.cache_room import with_room
from pipeload.storage.weights import Storage
from pipeload_export import export
from pipeload_export.shard.fuse import Fused
from pipeload_export.shard.liveness import live_bytes, live_tensors
from pipeload_export.shard.trial import run_trial

Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Name of a family -> its unsplit `model.onnx`, with its files beside it."""
    root = folder_of_the_run(tmp_path_factory) / "families"
    return lambda name: made_by_one(root / name, lambda folder: write_family(folder, name)) / "model.onnx"


@pytest.fixture(scope="session")
def exported(unsplit: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Name of a family -> its sharded model directory, compared with the unsplit graph."""
    root = folder_of_the_run(tmp_path_factory) / "exported-families"

    def make(folder: Path, name: str) -> None:
        try:
            export(unsplit(name), folder, task="feature-extraction")
        except ExportError as error:
            assert "no repeating" in str(error), error  # noqa: PT017 - any other reason is a fault
            export(unsplit(name), folder, task="feature-extraction", whole=True)

    return lambda name: made_by_one(root / name, lambda folder: make(folder, name))


@pytest.mark.parametrize(
    "name",
    [
        "wav2vec2",
        *map(slow, ("convnext", "detr", "clip", "bart")),
        *map(survey, ("siglip", "swin", "resnet", "mobilevit", "poolformer", "levit", "hubert")),
        *map(survey, ("wavlm", "vit", "segformer", "yolos")),
    ],
)
def test_sizes_that_belong_together_are_found(name: str, exported: Make) -> None:
    assert read(exported(name)).verification


def test_a_model_is_compared_at_the_sizes_of_its_processor_and_its_config(exported: Make, unsplit: Make) -> None:
    from pipeload_export import verify

    cases = verify(exported("dinov2"), unsplit("dinov2")).cases
    assert any("224 x 224" in case for case in cases)
    assert any("518 x 518" in case for case in cases)


@pytest.mark.parametrize("size", [56, 224, 518])
def test_interpolated_positions_run_at_every_size(size: int, exported: Make, unsplit: Make) -> None:
    import onnxruntime as ort

    import pipeload

    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    with pipeload.load(exported("dinov2"), memory_budget="8 GB") as model:
        found = model.run({"pixel_values": pixels})
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(unsplit("dinov2")), options, providers=["CPUExecutionProvider"])
    for value, wanted in zip(session.get_outputs(), session.run(None, {"pixel_values": pixels}), strict=True):
        np.testing.assert_allclose(found[value.name], wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))


@pytest.mark.survey
def test_a_branch_that_tracing_froze_is_the_reason(unsplit: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="batch_size 2 and sequence_length 16, the sizes at which it was traced"):
        export(unsplit("longformer"), tmp_path / "longformer")


_END_OF_TEXT = 2
_TEXTS = [{"sequence_length": n} for n in (4, 6, 9, 100, 500)]
_STEPS = [
    {"sequence_length": n, "past_sequence_length": past} for n, past in ((4, 2), (6, 5), (9, 7), (60, 0), (40, 200))
]


def _images(*pairs: tuple[int, int]) -> list[dict[str, int]]:
    return [{"num_channels": 3, "height": height, "width": width} for height, width in pairs]


_TOWERS = [
    {**_images((64, 64))[0], "text_batch_size": texts, "sequence_length": n}
    for texts, n in ((3, 5), (3, 9), (3, 30), (1, 16), (9, 60), (2, 64), (40, 12))
]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bert", _TEXTS),
        ("dinov2", _images((14, 28), (28, 42), (42, 42), (224, 224), (322, 518))),
        slow("clip", _TOWERS),
        survey("chinese_clip", _TOWERS),
        survey("siglip", [{**sizes, "image_batch_size": 4} for sizes in _TOWERS if sizes["sequence_length"] <= 16]),
        slow("bart", [*_TEXTS[:3], {"sequence_length": 60}]),
        survey("llama", _STEPS),
        survey("vit", _images((64, 64))),
        slow("convnext", _images((32, 64), (224, 224), (512, 384))),
        survey("mobilevit", _images((64, 64), (128, 128), (256, 512))),
        survey("poolformer", _images((32, 64), (224, 224), (512, 384))),
        survey("segformer", _images((32, 64), (64, 96), (96, 96), (224, 224), (512, 384))),
        survey("yolos", _images((16, 32), (32, 48), (48, 48), (224, 320), (512, 608))),
    ],
)
@pytest.mark.parametrize("batch", [2, slow(5)])
def test_predicted_activations_are_those_of_runs(
    name: str, sizes: list[dict[str, int]], batch: int, exported: Make, tmp_path: Path
) -> None:
    manifest = read(exported(name))
    for dims in sizes:
        dims = {"batch_size": batch, **dims}
        measured = _measured(manifest, exported(name), dims, tmp_path)
        for shard in manifest.shards:
            predicted = manifest.structures[shard.structure].activation_bytes(dims)
            assert measured[shard.name] <= predicted <= 1.1 * measured[shard.name], (shard.name, dims)


@pytest.mark.parametrize(("height", "width"), [(225, 230), (237, 224)])
def test_between_whole_patches_the_prediction_is_above(height: int, width: int, exported: Make, tmp_path: Path) -> None:
    directory = exported("dinov2")
    manifest = read(directory)
    dims = {"batch_size": 1, "num_channels": 3, "height": height, "width": width}
    for name, measured in _measured(manifest, directory, dims, tmp_path).items():
        shard = next(shard for shard in manifest.shards if shard.name == name)
        assert manifest.structures[shard.structure].activation_bytes(dims) >= measured


def test_a_plan_for_images_takes_what_they_need(exported: Make) -> None:
    from pipeload.planning.needs import pass_bytes

    manifest = read(exported("dinov2"))
    dims = {"batch_size": 1, "num_channels": 3, "height": 518, "width": 518}
    assert pass_bytes(manifest, dims) < 200e6


def _measured(manifest: Manifest, directory: Path, dims: dict[str, int], work: Path) -> dict[str, int]:
    """Bytes alive while each shard runs, with the inputs whose size the manifest does not know."""
    random = np.random.default_rng(0)
    dims = dims | {symbol: sum(dims.values()) for symbol in manifest.dims if symbol not in dims}
    state = {}
    for spec in manifest.inputs:
        shape = tuple(evaluate_dim(dim, dims) for dim in spec.shape)
        is_float = spec.dtype.startswith("float")
        state[spec.name] = random.standard_normal(shape).astype(spec.dtype) if is_float else np.ones(shape, spec.dtype)
    if "input_ids" in state:
        # BART looks for the end of a text.
        state["input_ids"][:, -1] = _END_OF_TEXT
    if caches := [cache.input for cache in manifest.caches if cache.in_place]:
        length, axis = length_input(manifest)
        state |= {name: with_room(state[name], state[length].shape[axis]) for name in caches}
    storage, unknown = Storage(directory, manifest, verify=False), {e.name for e in manifest.edges if not e.shape}
    result = {}
    for shard in manifest.shards:
        for lookup in shard.lookups:
            state[lookup.output] = storage.read_rows(lookup, state[lookup.indices], keep_cached=True)
        model = onnx.load(directory / shard.graph.path)
        inputs = {name: state[name] for name in shard.inputs}
        fused = Fused(model=model, external={}, dtypes={})
        (made,), (events,) = run_trial(fused, [inputs], shard.outputs, work)
        state.update(zip(shard.outputs, made, strict=True))
        shapes = {name: state[name].shape for name in (*shard.inputs, *shard.outputs)}
        taken = sum(array.nbytes for name, array in inputs.items() if name in unknown and array.ndim)
        result[shard.name] = max(live_bytes(live_tensors(model, events, shapes))) + taken
    return result
