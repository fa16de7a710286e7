"""The models of a soak, and the answers of each without a limit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.models import REPOSITORY, made_once
from tests.shared import made_by_one
from tests.soak.calls import answer
from tests.soak.draw import Model, Step

import pipeload
from pipeload.format import manifest as manifests

__all__ = ["Unlimited", "available", "weight_bytes"]

_EXPORTED = REPOSITORY / "models" / "exported"
_MADE = REPOSITORY / "build" / "soak" / "models"
_TINY = {
    "bert": "encoder",
    "gpt2": "decoder",
    "llama": "decoder",
    "vit": "image",
    "toy": "toy",
    "toy-other": "toy",
    "toy-uneven": "toy",
    "toy-large": "toy",
    "toy-narrow": "toy",
    "toy-small": "toy",
    "toy-large-common": "toy",
}
_REAL = {"minilm": ("sentence", 30_000, 8), "smollm2-135m": ("decoder", 49_000, 8)}
_ROUNDED = {
    "minilm-int8": ("minilm", "int8", 4),
    "minilm-int4": ("minilm", "int4", 3),
}
_OPEN_MODELS = 3


def available(*, short: bool = False) -> dict[str, tuple[Model, Path]]:
    """The models that this machine has or can make, and their directories; `short` leaves the real ones out."""
    folder = made_once(*_TINY)
    found: dict[str, tuple[Model, Path]] = {}
    for name, kind in _TINY.items():
        known = Model(name, kind, 96 if kind == "toy" else 1000, 1)  # type: ignore[arg-type]
        found[name] = known, folder / name
    found["llama-int8-caches"] = Model("llama-int8-caches", "decoder", 1000), folder / "llama" / "int8"
    if short:
        return found
    for name, (kind, vocabulary, weight) in _REAL.items():
        if (_EXPORTED / name / manifests.MANIFEST_NAME).exists():
            found[name] = Model(name, kind, vocabulary, weight), _EXPORTED / name  # type: ignore[arg-type]
    for name, (source, weights, weight) in _ROUNDED.items():
        if source in found:
            directory = made_by_one(_MADE / name, lambda out, s=source, w=weights: _round(found[s][1], out, w))
            known = found[source][0]
            found[name] = Model(name, known.kind, known.vocabulary, weight), directory
    return found


def _round(source: Path, directory: Path, weights: str) -> None:
    from pipeload_export import convert

    convert(source, directory, weights=weights, verify=False)  # type: ignore[arg-type]


def weight_bytes(directory: Path) -> int:
    """All weights of a model as they lie in memory."""
    return manifests.read(directory).weight_bytes


class Unlimited:
    """The answers of processes without a limit: all models in this one, the latest few open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, pipeload.Model] = OrderedDict()

    def answer(self, known: Model, directory: Path, step: Step) -> dict[str, NDArray[np.generic]]:
        """The right answer of a step."""
        return answer(self._model(directory), known, step)

    def logits(self, known: Model, directory: Path, ids: list[int]) -> NDArray[np.float32]:
        """Of the token that follows."""
        model = self._model(directory)
        array = np.array([ids], np.int64)
        given = {"input_ids": array, "attention_mask": np.ones_like(array), "position_ids": np.arange(len(ids))[None]}
        state = model.new_state()
        try:
            found: NDArray[np.float32] = model.step({spec.name: given[spec.name] for spec in model.inputs}, state)[
                0, -1
            ]
        finally:
            state.close()
        return found

    def _model(self, directory: Path) -> pipeload.Model:
        if directory not in self._open:
            while len(self._open) >= _OPEN_MODELS:
                self._open.popitem(last=False)[1].close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pipeload.QuantisationWarning)
                self._open[directory] = pipeload.load(directory, "4GB")
        self._open.move_to_end(directory)
        return self._open[directory]

    def close(self) -> None:
        """Close all models."""
        while self._open:
            self._open.popitem()[1].close()
