"""The modules of sentence-transformers that come after the pooling: each is a step from vectors to vectors.

Their weights are a few megabytes in safetensors files beside `modules.json`, and stay in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format.safetensors import places
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.embed.pooling import normalized
from pipeload.tasks.model_files import read_settings

__all__ = ["Module", "Step", "pooling_folder", "steps"]

Floats = NDArray[np.float32]
Step = Callable[[Floats], Floats]

_REMEDY = "Take the token vectors from model.run and finish them yourself."
_MOST_BYTES = 256 << 20
_EPSILON = np.float32(1e-5)
_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


class Module(msgspec.Struct, frozen=True):
    """An entry of `modules.json`."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        """The name of its class, without the package, which differs between versions."""
        return self.type.rpartition(".")[2]


class _Names(msgspec.Struct, frozen=True, kw_only=True):
    """`2_Normalize/config.json`: what is changed, and what becomes of it."""

    module_input_name: str = "sentence_embedding"
    module_output_name: str | None = None

    def check_pooled(self, module: Module) -> None:
        """Raise ConfigError unless it is about the pooled vectors alone."""
        made = self.module_output_name or self.module_input_name
        if {self.module_input_name, made} != {"sentence_embedding"}:
            raise ConfigError(
                f"The module in '{module.path}' makes '{made}' of '{self.module_input_name}'; pipeload applies a "
                f"{module.kind} to 'sentence_embedding'. {_REMEDY}"
            )


class _Dense(_Names, frozen=True, kw_only=True):
    """`2_Dense/config.json`."""

    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


def pooling_folder(modules: Sequence[Module]) -> str:
    """The folder with the settings of the pooling."""
    return next((module.path for module in modules if module.kind == "Pooling"), "1_Pooling")


def steps(files: ModelFiles, modules: Sequence[Module]) -> tuple[Step, ...]:
    """What is done to the pooled vectors, in order.

    Raises:
        ConfigError: a module that pipeload does not run, or not at its place.
        ShardError: a module's files are missing or damaged.
    """
    kinds = [module.kind for module in modules]
    pooled = kinds.index("Pooling") + 1 if "Pooling" in kinds else kinds.count("Transformer")
    # Leaving a module out would silently change every vector.
    if unknown := [kind for kind in kinds[:pooled] if kind not in ("Transformer", "Pooling", "Dropout")]:
        raise ConfigError(
            f"The model's modules.json has the module '{unknown[0]}' before the pooling, which pipeload does not run. "
            f"{_REMEDY}"
        )
    return tuple(_step(files, module) for module in modules[pooled:] if module.kind != "Dropout")


def _step(files: ModelFiles, module: Module) -> Step:
    if module.kind == "Normalize":
        if module.path:
            read_settings(files, f"{module.path}/config.json", _Names).check_pooled(module)
        return normalized
    if module.kind == "Dense":
        return _dense(files, module)
    if module.kind == "LayerNorm":
        return _layer_norm(files, module)
    raise ConfigError(
        f"The model's modules.json has the module '{module.kind}', which pipeload does not run. {_REMEDY}"
    )


def _dense(files: ModelFiles, module: Module) -> Step:
    settings = read_settings(files, f"{module.path}/config.json", _Dense)
    settings.check_pooled(module)
    # A class of another package may be called as one of torch's.
    package, _, name = settings.activation_function.rpartition(".")
    if package.partition(".")[0] != "torch" or name not in _ACTIVATIONS:
        raise ConfigError(
            f"The module in '{module.path}' applies {settings.activation_function}; pipeload has "
            f"{', '.join(_ACTIVATIONS)} of torch. {_REMEDY}"
        )
    activate = _ACTIVATIONS[name]
    weights = _weights(files, module, {"linear.weight": "oi", "linear.bias": "o", "residual.weight": "oi"}, 1)
    matrix, bias = weights["linear.weight"], weights.get("linear.bias", np.zeros(1, np.float32))
    around = _residual(module, matrix, weights.get("residual.weight")) if settings.use_residual else None

    def step(vectors: Floats) -> Floats:
        made = activate(vectors @ matrix.T + bias)
        return made if around is None else made + around(vectors)

    return step


def _residual(module: Module, matrix: Floats, other: Floats | None) -> Step:
    """What a Dense adds to its result: the vectors as they came, or a product where the width changes."""
    if matrix.shape[0] == matrix.shape[1]:
        return _identity
    if other is None:
        raise ShardError(
            f"'{module.path}/model.safetensors' is damaged: it has no tensor 'residual.weight'. Export the model again."
        )
    return lambda vectors: vectors @ other.T


def _layer_norm(files: ModelFiles, module: Module) -> Step:
    weights = _weights(files, module, {"norm.weight": "o", "norm.bias": "o"}, 2)
    scale, bias = weights["norm.weight"], weights["norm.bias"]

    def step(vectors: Floats) -> Floats:
        centred = vectors - vectors.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: Floats = centred / np.sqrt(variance + _EPSILON) * scale + bias
        return scaled

    return step


def _weights(files: ModelFiles, module: Module, shapes: Mapping[str, str], needed: int) -> dict[str, Floats]:
    """The module's tensors.

    Args:
        files: of the model.
        module: whose weights they are.
        shapes: tensor -> a letter for each dimension, the same one where sizes are the same: numpy would take others,
            and make other vectors of them.
        needed: number of these, from the first on, that it must have.
    """
    name = f"{module.path}/model.safetensors"
    data = files.read(name, most_bytes=_MOST_BYTES)
    if data is None:
        raise ShardError(
            f"The module in '{module.path}' has no weights: '{name}' is missing. Export the model again, from a folder "
            "that has it as safetensors."
        )
    with foreign_errors(ShardError, f"'{name}' is damaged", "Export the model again."):
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        found = {
            key: _floats(np.ndarray(shape, _STORED[dtype], data, begin), dtype)
            for key, (dtype, shape, begin) in places(header).items()
        }
        if missing := [key for key in list(shapes)[:needed] if key not in found]:
            raise LookupError(f"it has no tensor '{missing[0]}'")
        sizes: dict[str, int] = {}
        for key in (key for key in shapes if key in found):
            shape, letters = found[key].shape, shapes[key]
            pairs = zip(letters, shape, strict=False)
            if len(shape) != len(letters) or any(sizes.setdefault(letter, size) != size for letter, size in pairs):
                raise ValueError(f"its tensor '{key}' has the shape {list(shape)}")
        return found


def _floats(stored: NDArray[Any], dtype: str) -> Floats:
    """A bfloat16 is the first half of a float32."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _sigmoid(values: Floats) -> Floats:
    half: Floats = np.tanh(values * np.float32(0.5))
    return half * np.float32(0.5) + np.float32(0.5)


def _relu(values: Floats) -> Floats:
    return np.maximum(values, np.float32(0))


def _identity(values: Floats) -> Floats:
    return values


def _gelu(values: Floats) -> Floats:
    # The exact form: sentence-transformers keeps the name of the class alone, so the other one is never asked for.
    made = (0.5 * value * math.erfc(-value * math.sqrt(0.5)) for value in map(float, values.flat))
    return np.fromiter(made, np.float32, values.size).reshape(values.shape)


_ACTIVATIONS: Mapping[str, Step] = {
    "Identity": _identity,
    "Tanh": np.tanh,
    "ReLU": _relu,
    "Sigmoid": _sigmoid,
    "GELU": _gelu,
}
