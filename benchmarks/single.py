"""Single-session ONNX Runtime behind the same interface as a pipeload model, so that only the engine differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeload import manifest as manifests

__all__ = ["SingleSession"]


class SingleState:
    """KV caches as arrays."""

    def __init__(self) -> None:
        self.length = 0
        self.caches: dict[str, NDArray[Any]] = {}

    def close(self) -> None:
        self.caches.clear()

    def __enter__(self) -> SingleState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SingleSession:
    """The unsplit graph in one session.

    Args:
        onnx: the unsplit `.onnx` file.
        directory: the sharded directory of the same model, for its tokenizer and names.
        mapped: prepacking off, so that external data stays memory-mapped: the strongest baseline when memory is short.
        threads: intra-op threads.
    """

    def __init__(self, onnx: Path, directory: Path, *, mapped: bool, threads: int) -> None:
        self.directory = directory
        self.manifest = manifests.read(directory)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All graph outputs; caches that are left out are empty."""
        dims = manifests.bind_dims(self.manifest.inputs, {name: array.shape for name, array in inputs.items()})
        dims = {symbol: dims.get(symbol, 0) for symbol in self.manifest.dims}
        feed = dict(inputs)
        for spec in self.manifest.inputs:
            if spec.name not in feed:
                feed[spec.name] = np.zeros([manifests.evaluate_dim(d, dims) for d in spec.shape], spec.dtype)
        names = [spec.name for spec in self.manifest.outputs]
        return dict(zip(names, self._session.run(names, feed), strict=True))

    def new_state(self, capacity: int = 0) -> SingleState:
        """An empty cache; the capacity is not needed."""
        del capacity
        return SingleState()

    def step(self, inputs: Mapping[str, NDArray[Any]], state: SingleState) -> NDArray[np.float32]:
        """One pass over new tokens; logits of the last position."""
        outputs = self.run({**inputs, **state.caches})
        state.caches = {cache.input: outputs[cache.output] for cache in self.manifest.caches}
        state.length += next(iter(inputs.values())).shape[1]
        logits: NDArray[np.float32] = outputs[self.manifest.outputs[0].name][:, -1, :]
        return logits
