"""One tiny seeded BERT, ViT and Llama as `.onnx` files, exported once a session, and what they answer as shards."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx.version_converter
import onnxruntime
import pytest
from tests.models import seeded
from tests.shared import folder_of_the_run, made_by_one

from pipeload.format.closeness import range_of
from pipeload.format.manifest import Manifest
from pipeload_export import export
from pipeload_export.check.cases import sample_cases
from pipeload_export.check.chain import run_shards

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.2,
}
_TEXT = {**_SMALL, "vocab_size": 1000, "max_position_embeddings": 64}
# name -> (class of transformers, class of its config, the config's arguments, task, task of optimum)
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any], str, str]] = {
    "bert": ("BertModel", "BertConfig", _TEXT, "feature-extraction", "feature-extraction"),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SMALL, "image_size": 32, "patch_size": 8},
        "image-classification",
        "image-classification",
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "text-generation",
        "text-generation-with-past",
    ),
}
OPSET = 18
"""Of the graphs that are changed in other ways."""
_NEWEST_TRACED = 20
"""torch's tracer knows no newer ones; onnx converts into them."""


class Source(Protocol):
    def __call__(self, name: str, opset: int = OPSET) -> Path: ...


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model's name and an opset -> its `model.onnx`, beside its config."""
    root = folder_of_the_run(tmp_path_factory) / "variants"

    def get(name: str, opset: int = OPSET) -> Path:
        if opset <= _NEWEST_TRACED:
            return made_by_one(root / f"{name}-{opset}", lambda folder: _export(folder, name, opset)) / "model.onnx"
        traced = get(name, _NEWEST_TRACED)

        def convert(folder: Path) -> None:
            shutil.copytree(traced.parent, folder, dirs_exist_ok=True)
            onnx.save(onnx.version_converter.convert_version(onnx.load(traced), opset), folder / "model.onnx")

        return made_by_one(root / f"{name}-{opset}", convert) / "model.onnx"

    return get


@pytest.fixture
def variant(source: Source, tmp_path: Path) -> Callable[..., Path]:
    """A model's name and a change (its source and target are `.onnx` files) -> the changed model, beside its config."""

    def get(name: str, change: Callable[[Path, Path], object], opset: int = OPSET) -> Path:
        original, folder = source(name, opset), tmp_path / "variant"
        folder.mkdir()
        for file in original.parent.glob("*.json"):
            shutil.copy(file, folder)
        change(original, folder / "model.onnx")
        return folder / "model.onnx"

    return get


@pytest.fixture
def assert_right(tmp_path: Path) -> Callable[..., Manifest]:
    """Export a graph, and hold the shards against the graph in onnxruntime as people run it.

    The limit is a part of each output's range.
    """

    def check(path: Path, name: str, *, limit: float = 1e-4, **options: Any) -> Manifest:
        target = tmp_path / "target"
        manifest = export(path, target, task=MODELS[name][3], **options)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        cases = sample_cases(manifest, target)
        for case, found in zip(cases, run_shards(target, manifest, cases, lambda *_: None), strict=True):
            for output, wanted in zip(names, session.run(names, case.inputs), strict=True):
                assert found[output].dtype == wanted.dtype
                np.testing.assert_allclose(
                    found[output].astype(np.float64),
                    wanted,
                    rtol=0,
                    atol=limit * range_of(wanted, wanted.dtype.name),
                    err_msg=f"{output}, {case.name}",
                )
        return manifest

    return check


def _export(folder: Path, name: str, opset: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporters = pytest.importorskip("optimum.exporters.onnx")
        model_class, config_class, options, _, task = MODELS[name]
        # Attention as small operators, which every opset has.
        model = seeded(model_class, config_class, {**options, "attn_implementation": "eager"})
        exporters.onnx_export_from_model(model, output=folder, task=task, do_validation=False, opset=opset)
