"""In the engine, decoders of fp16 and Bloom, whose caches are written in place, answer as their unsplit graphs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.harness import assert_close, run_in_one_sweep
from tests.marks import slow
from tests.shared import folder_of_the_run, made_by_one
from tests.variants.changes import half

import pipeload
from pipeload import decode
from pipeload.format.manifest import Manifest, read
from pipeload.pipeline.session import to_array
from pipeload_export import export
from pipeload_export.graph.runtime import open_session

KINDS = ("bloom", "half llama", slow("half bloom"), slow("half gpt2"))
_CLOSE = {"model": 1e-5, "half": 5e-3, "int8": 0.05}
"""Of the range of an output. Over three layers 0.0006 was seen with fp16, and 0.02 with int8."""

Arrays = dict[str, NDArray[Any]]


class Decoder:
    """A decoder in the engine, and its unsplit graph.

    Args:
        unsplit: the graph.
        directory: its shards.
        limit: how far answers may lie apart, as a part of an output's range.
    """

    def __init__(self, unsplit: Path, directory: Path, limit: float) -> None:
        self.directory, self.limit = directory, limit
        # Optimised, the graph of Llama in fp16 would be off from that in float32 by twenty times as much.
        self._session = open_session(unsplit, str(unsplit))

    def wanted(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Logits of the whole text, from the unsplit graph."""
        empty: Arrays = {}
        for spec in self._session.get_inputs():
            if spec.name.startswith("past"):
                kind = np.float16 if "float16" in spec.type else np.float32
                empty[spec.name] = np.zeros((len(inputs["input_ids"]), spec.shape[1], 0, spec.shape[3]), kind)
        (logits,) = self._session.run(["logits"], {**inputs, **empty})
        return logits

    def inputs(self, manifest: Manifest, ids: NDArray[Any], mask: NDArray[Any], begin: int = 0) -> Arrays:
        """The tokens from `begin` on."""
        positions = np.where(mask == 0, 1, mask.cumsum(axis=-1) - 1)
        offered = {"input_ids": ids[:, begin:], "attention_mask": mask, "position_ids": positions[:, begin:]}
        return {spec.name: offered[spec.name] for spec in manifest.free_inputs}

    def hold(self, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Compare logits."""
        assert_close({"logits": found.astype(np.float32)}, {"logits": wanted.astype(np.float32)}, self.limit)


@pytest.fixture(scope="module", params=KINDS)
def graph(
    request: pytest.FixtureRequest, architecture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    *halved, name = request.param.split()
    path = architecture(name)
    if not halved:
        return path
    root = folder_of_the_run(tmp_path_factory) / "halves"

    def convert(folder: Path) -> None:
        folder.mkdir(parents=True)
        half(keep_io_types=False)(path, folder / "model.onnx")

    return made_by_one(root / name, convert) / "model.onnx"


@pytest.fixture(scope="module", params=["model", "int8"])
def decoder(request: pytest.FixtureRequest, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("decoder") / "model"
    manifest = export(graph, directory, task="text-generation", kv_cache=request.param)
    assert manifest.caches
    assert all(cache.in_place for cache in manifest.caches)
    kind = "half" if "halves" in graph.parts and request.param == "model" else request.param
    return Decoder(graph, directory, _CLOSE[kind])


def test_padded_and_hidden_texts(decoder: Decoder) -> None:
    ids = np.random.default_rng(0).integers(0, 1000, (4, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -3:] = 0
    mask[3] = 0
    with pipeload.load(decoder.directory) as model:
        inputs = decoder.inputs(model.manifest, ids, mask)
        found = model.run(inputs)["logits"]
    decoder.hold(found, decoder.wanted(inputs))


def test_a_long_prompt_in_pieces_and_the_steps_behind_it(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CAPACITY_STEP", 8)
    monkeypatch.setattr(decode, "_PIECE_TOKENS", 16)
    ids = np.random.default_rng(1).integers(0, 1000, (2, 60))
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    with pipeload.load(decoder.directory) as model, model.new_state() as state:
        rooms = set()
        for begin, end in [(0, 41), *((place, place + 1) for place in range(41, 58)), (58, 60)]:
            found = model.step(decoder.inputs(model.manifest, ids[:, :end], mask[:, :end], begin), state)[:, -1]
            wanted = decoder.wanted(decoder.inputs(model.manifest, ids[:, :end], mask[:, :end]))[:, -1]
            decoder.hold(found, wanted)
            (room,) = {to_array(value).shape[2] for value in state.caches.values()}
            rooms.add(room)
        assert sorted(rooms) == [48, 56, 64]


def test_callers_of_one_sweep(decoder: Decoder) -> None:
    random = np.random.default_rng(2)
    texts = [random.integers(0, 1000, (1, length)) for length in (5, 1, 12)]
    manifest = read(decoder.directory)
    given = [decoder.inputs(manifest, ids, np.ones_like(ids)) for ids in texts]
    for inputs, found in zip(given, run_in_one_sweep(decoder.directory, given, threads=1), strict=True):
        decoder.hold(found["logits"], decoder.wanted(inputs))
