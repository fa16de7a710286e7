"""Every family's real architecture as a tiny seeded ONNX graph, exported once a session, and a way to run shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.shared import folder_of_the_run, made_by_one

from pipeload.format.manifest import Manifest, TensorSpec, evaluate_dim, read, write
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_shards
from pipeload_export.split import SplitModel, split

_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_SMALL, "vocab_size": 1000}
_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
_IMAGE = {**_SMALL, "image_size": 32, "patch_size": 8}
_NEO = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 1000, "max_position_embeddings": 128}

# name -> (class of transformers, class of its config, the config's arguments, task of optimum)
ARCHITECTURES: Mapping[str, tuple[str, str, Mapping[str, Any], str]] = {
    "bert": ("BertModel", "BertConfig", _TEXT, "feature-extraction"),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _TEXT, "fill-mask"),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", _TEXT, "question-answering"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT, "text-classification"),
    "distilbert": (
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 1000},
        "token-classification",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, "image-classification"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE, "image-classification"),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000},
        "text-generation-with-past",
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT, "text-generation-with-past"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}, "text-generation-with-past"),
    "gptneo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_NEO, "attention_types": [[["global", "local"], 2]], "window_size": 16},
        "text-generation-with-past",
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True},
        "text-generation-with-past",
    ),
}

Arrays = dict[str, NDArray[Any]]


class Sharded:
    """A model that was split: the result, its manifest as read back, and how to run it."""

    def __init__(self, path: Path, directory: Path, **options: Any) -> None:
        (directory / "shards").mkdir(parents=True)
        self.unsplit = path
        self.directory = directory
        self.model: SplitModel = split(path, directory / "shards", **options)
        parts = {field.name: getattr(self.model, field.name) for field in fields(SplitModel)}
        write(Manifest(exporter="test", source="test", model_type="test", task="test", **parts), directory)
        self.manifest = read(directory)

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.model.shards]

    @property
    def blocks(self) -> int:
        return sum(shard.role == "block" for shard in self.model.shards)

    def inputs(self, dims: Mapping[str, int], seed: int = 0) -> Arrays:
        """Seeded inputs: small integers, masks of ones, floats around zero."""
        random = np.random.default_rng(seed)
        return {spec.name: _array(spec, dims, random) for spec in self.model.inputs}

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs of the shards, one after another, in plain onnxruntime."""
        case = Case(name="test", inputs=inputs)
        return run_shards(self.directory, self.manifest, [case], lambda *_: None)[0]


def _array(spec: TensorSpec, dims: Mapping[str, int], random: np.random.Generator) -> NDArray[Any]:
    shape = tuple(evaluate_dim(dim, dims) for dim in spec.shape)
    if spec.dtype == "int64":
        return np.ones(shape, np.int64) if "mask" in spec.name else random.integers(0, 2, shape)
    return random.standard_normal(shape).astype(spec.dtype)


def assert_same_answers(
    wanted: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]], part: float = 1e-5
) -> None:
    """Equal within a part of each output's range."""
    assert set(wanted) == set(found)
    for name, array in wanted.items():
        assert array.shape == found[name].shape, name
        limit = part * max(float(np.abs(array).max(initial=0)), 1e-6)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=limit, err_msg=name)


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of an architecture -> its unsplit `model.onnx`."""
    root = folder_of_the_run(tmp_path_factory) / "architectures"
    return lambda name: made_by_one(root / name, lambda folder: _export(folder, name)) / "model.onnx"


@pytest.fixture(scope="session")
def sharded_architecture(
    architecture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Sharded]:
    """Name of an architecture -> its shards."""
    root = tmp_path_factory.mktemp("sharded")
    made: dict[str, Sharded] = {}

    def get(name: str) -> Sharded:
        if name not in made:
            made[name] = Sharded(architecture(name), root / name)
        return made[name]

    return get


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Sharded]:
    """A path or a model -> its shards."""
    import onnx

    def make(source: Any, name: str = "sharded", **options: Any) -> Sharded:
        path = source
        if not isinstance(source, Path):
            path = tmp_path / f"{name}.onnx"
            onnx.save(source, str(path))
        return Sharded(path, tmp_path / name, **options)

    return make


def _export(folder: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        exporters = pytest.importorskip("optimum.exporters.onnx")
        model_class, config_class, options, task = ARCHITECTURES[name]
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
        exporters.onnx_export_from_model(model, output=folder, task=task, do_validation=False)
