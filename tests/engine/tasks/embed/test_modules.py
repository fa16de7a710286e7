"""Every module of sentence-transformers is applied in its order, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.tasks.fakes import ToyRunner, manifest, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.embed.pooling import normalized

pytest.importorskip("tokenizers")

HIDDEN, WIDTH = 4, 3
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((30, HIDDEN)).astype(np.float32)
MATRIX = RANDOM.standard_normal((WIDTH, HIDDEN)).astype(np.float32)
SQUARE = RANDOM.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
BIAS = RANDOM.standard_normal(WIDTH).astype(np.float32)
OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules.some"

Arrays = dict[str, NDArray[Any]]


def write_weights(path: Path, tensors: Arrays) -> None:
    entries, data = {}, b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "uint16": "BF16"}[str(array.dtype)]
        entries[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def runner_with(directory: Path, *modules: str, package: str = OLD) -> ToyRunner:
    """A model of tokens with these modules behind the pooling."""
    kinds = ["Transformer", "Pooling", *modules]
    listed = [{"path": f"{n}_{kind}" if n else "", "type": f"{package}.{kind}"} for n, kind in enumerate(kinds)]
    write_json(directory, "modules.json", listed)
    write_bert_tokenizer(directory)
    shape = {"last_hidden_state": ("batch_size", "sequence_length", HIDDEN)}
    return ToyRunner(
        directory,
        manifest("feature-extraction", outputs=shape),
        lambda inputs: {"last_hidden_state": TABLE[inputs["input_ids"]]},
    )


def write_dense(directory: Path, name: str, activation: str, tensors: Arrays, **settings: Any) -> None:
    write_json(directory, f"{name}/config.json", {"activation_function": activation, **settings})
    write_weights(directory / name / "model.safetensors", tensors)


def mean(text: str = "dog") -> NDArray[np.float32]:
    ids = {"dog": [2, 7, 3]}[text]
    vector: NDArray[np.float32] = TABLE[ids].mean(axis=0)
    return vector


@pytest.mark.parametrize("package", [OLD, NEW])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("torch.nn.modules.activation.Tanh", np.tanh),
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.ReLU", lambda x: np.maximum(x, 0)),
        ("torch.nn.modules.activation.Sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("torch.nn.modules.activation.GELU", lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2),
    ],
)
def test_a_dense_layer_and_its_activation(tmp_path: Path, package: str, activation: str, function: Any) -> None:
    runner = runner_with(tmp_path, "Dense", "Normalize", package=package)
    write_dense(tmp_path, "2_Dense", activation, {"linear.weight": MATRIX, "linear.bias": BIAS})
    expected = normalized(function(MATRIX @ mean() + BIAS)[None])[0]
    np.testing.assert_allclose(embed(runner, "dog"), expected, rtol=1e-5)
    assert embed(runner, []).shape == (0, WIDTH)


def test_a_dense_layer_without_bias_in_halves(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, "Dense")
    write_dense(tmp_path, "2_Dense", "torch.nn.Identity", {"linear.weight": MATRIX.astype(np.float16)}, bias=False)
    vector = embed(runner, "dog")
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, MATRIX.astype(np.float16).astype(np.float32) @ mean(), rtol=1e-5)


def test_a_dense_layer_in_bfloat16(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, "Dense")
    halves = (MATRIX.view(np.uint32) >> 16).astype(np.uint16)
    write_dense(tmp_path, "2_Dense", "torch.nn.Identity", {"linear.weight": halves}, bias=False)
    matrix = (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(embed(runner, "dog"), matrix @ mean(), rtol=1e-5)


def test_modules_apply_in_their_order_even_two_of_a_kind(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, "Normalize", "Dense", "Dropout", "Dense")
    write_dense(tmp_path, "3_Dense", "torch.nn.Tanh", {"linear.weight": SQUARE})
    write_dense(tmp_path, "5_Dense", "torch.nn.Tanh", {"linear.weight": MATRIX})
    expected = np.tanh(MATRIX @ np.tanh(SQUARE @ normalized(mean()[None])[0]))
    np.testing.assert_allclose(embed(runner, "dog"), expected, rtol=1e-5)


def test_a_layer_norm(tmp_path: Path) -> None:
    scale, bias = SQUARE[0], SQUARE[1]
    runner = runner_with(tmp_path, "LayerNorm")
    write_weights(tmp_path / "2_LayerNorm" / "model.safetensors", {"norm.weight": scale, "norm.bias": bias})
    vector = mean()
    expected = (vector - vector.mean()) / np.sqrt(vector.var() + 1e-5) * scale + bias
    np.testing.assert_allclose(embed(runner, "dog"), expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["cls", ["cls", "mean"]])
def test_the_pooling_of_sentence_transformers_5(tmp_path: Path, mode: Any) -> None:
    runner = runner_with(tmp_path, package=NEW)
    write_json(tmp_path, "1_Pooling/config.json", {"embedding_dimension": HIDDEN, "pooling_mode": mode})
    expected = TABLE[2] if mode == "cls" else np.concatenate([TABLE[2], mean()])
    np.testing.assert_allclose(embed(runner, "dog"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "settings", "said"),
    [
        ("torch.nn.modules.activation.Softplus", {}, r"applies torch\.nn\.modules\.activation\.Softplus;"),
        ("own.package.Tanh", {}, r"applies own\.package\.Tanh;"),
        ("torch.nn.Tanh", {"module_input_name": "token_embeddings"}, "makes 'token_embeddings' of 'token_embeddings'"),
        ("torch.nn.Tanh", {"module_output_name": "more"}, "makes 'more' of 'sentence_embedding'"),
    ],
)
def test_another_dense_layer_is_refused_by_name(tmp_path: Path, activation: str, settings: Any, said: str) -> None:
    runner = runner_with(tmp_path, "Dense")
    write_dense(tmp_path, "2_Dense", activation, {"linear.weight": MATRIX}, **settings)
    with pytest.raises(ConfigError, match=f"'2_Dense' {said}"):
        embed(runner, "dog")


def test_vectors_are_normalised_or_the_module_is_refused_by_name(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, "Normalize")
    write_json(tmp_path, "2_Normalize/config.json", {"module_input_name": "token_embeddings"})
    with pytest.raises(ConfigError, match=r"'2_Normalize' makes 'token_embeddings'.* applies a Normalize to 'sent"):
        embed(runner, "dog")


@pytest.mark.parametrize("width", [WIDTH, HIDDEN])
def test_a_dense_layer_adds_what_it_was_given(tmp_path: Path, width: int) -> None:
    runner = runner_with(tmp_path, "Dense")
    matrix, other = SQUARE[:width], RANDOM.standard_normal((width, HIDDEN)).astype(np.float32)
    tensors = {"linear.weight": matrix} | ({} if width == HIDDEN else {"residual.weight": other})
    write_dense(tmp_path, "2_Dense", "torch.nn.Tanh", tensors, use_residual=True, bias=False)
    added = mean() if width == HIDDEN else other @ mean()
    np.testing.assert_allclose(embed(runner, "dog"), np.tanh(matrix @ mean()) + added, rtol=1e-5)


def test_a_module_before_the_pooling_is_refused_by_name(tmp_path: Path) -> None:
    runner = runner_with(tmp_path)
    listed = [{"type": f"{OLD}.{kind}", "path": kind} for kind in ("Transformer", "Dense", "Pooling")]
    write_json(tmp_path, "modules.json", listed)
    with pytest.raises(ConfigError, match="module 'Dense' before the pooling"):
        embed(runner, "dog")


def test_weights_that_are_missing_or_damaged_are_told_by_name(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, "LayerNorm")
    path = tmp_path / "2_LayerNorm" / "model.safetensors"
    with pytest.raises(ShardError, match=r"'2_LayerNorm/model\.safetensors' is missing"):
        embed(runner, "dog")
    write_weights(path, {"norm.weight": MATRIX})
    with pytest.raises(ShardError, match=r"is damaged: it has no tensor 'norm\.bias'"):
        embed(runner, "dog")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ShardError, match="is damaged"):
        embed(runner, "dog")
    runner = runner_with(tmp_path, "Dense")
    write_dense(tmp_path, "2_Dense", "torch.nn.Tanh", {"linear.weight": MATRIX}, use_residual=True)
    with pytest.raises(ShardError, match=r"has no tensor 'residual\.weight'"):
        embed(runner, "dog")


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("linear.weight", {"linear.weight": SQUARE.reshape(-1)}),
        ("linear.weight", {"linear.weight": SQUARE[None]}),
        # numpy would take both for all dimensions.
        ("linear.bias", {"linear.weight": MATRIX, "linear.bias": BIAS[:1]}),
        ("linear.bias", {"linear.weight": SQUARE, "linear.bias": SQUARE}),
        ("residual.weight", {"linear.weight": MATRIX, "residual.weight": MATRIX[:1]}),
        ("norm.weight", {"norm.weight": SQUARE, "norm.bias": SQUARE[0]}),
        ("norm.bias", {"norm.weight": SQUARE[0], "norm.bias": SQUARE[0, :1]}),
    ],
)
def test_weights_of_another_shape_are_told_by_name(tmp_path: Path, name: str, tensors: Arrays) -> None:
    kind = "LayerNorm" if name.startswith("norm") else "Dense"
    runner = runner_with(tmp_path, kind)
    write_dense(tmp_path, f"2_{kind}", "torch.nn.Tanh", tensors, use_residual=True)
    with pytest.raises(ShardError, match=rf"is damaged: its tensor '{name}' has the shape \["):
        embed(runner, "dog")
