"""One shard's ONNX Runtime session over borrowed buffers. The only module that imports onnxruntime.

Shards are optimised when they are exported, so sessions are made with optimisation off. A streamed shard borrows
its weights from buffers, without a copy and without prepacking, and is made in a millisecond or two. A packed session
copies the weights and lays them out for the CPU, which costs far more and makes each run faster: it no longer needs
the buffers.

Nothing here touches onnxruntime's process-wide state: every session has its own threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeload.buffers import Part, tensor_in
from pipeload.errors import ClosedError, LoadError, RunError
from pipeload.manifest import Shard

__all__ = ["ShardSession", "Stopper", "Value", "to_array", "to_value"]

Value: TypeAlias = ort.OrtValue
"""A tensor in onnxruntime's memory, which travels between shards without a copy."""

_BFLOAT16 = 16
"""ONNX's number for an element type that NumPy does not have."""


def to_value(array: NDArray[Any], dtype: str | None = None) -> Value:
    """A value that borrows a C-contiguous array; the array must not change while the value lives."""
    array = np.asarray(array, order="C")
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_array(value: Value) -> NDArray[Any]:
    """The value as an array over the same memory, which keeps the value alive as long as the array lives."""
    array: NDArray[Any] = np.asarray(_Owner(value))
    return array


class _Owner:
    """Base of an array over a value. onnxruntime's own arrays do not keep alive what a value has borrowed."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self.__array_interface__ = value.numpy().__array_interface__


class Stopper:
    """Ends whatever session runs under it, from any thread."""

    def __init__(self) -> None:
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4
        self.stopped = False

    def stop(self) -> None:
        """Make the running session, and every later one, fail."""
        self.stopped = True
        self._options.terminate = True


class ShardSession:
    """A shard that is ready to run.

    Args:
        shard: what it is.
        graph: its `.onnx` file.
        parts: memory that holds all of its weights. It must stay as it is until the session is gone; a packed session
            needs it only while it is made.
        threads: intra-op threads.
        packed: lay the weights out for the CPU, in memory of the session's own.
        lasting: the session will run many times, and not while Loading Agents need the cores.

    Raises:
        LoadError: onnxruntime refused the graph.
    """

    def __init__(
        self,
        shard: Shard,
        graph: Path,
        parts: Sequence[Part],
        threads: int,
        *,
        packed: bool = False,
        lasting: bool = False,
    ) -> None:
        self._name = shard.name
        self._outputs = list(shard.outputs)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # An arena per session would round every block of memory up and keep it.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        if lasting:
            # The pool stops spinning when the run ends: the next shard's pool needs the cores.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        else:
            # The threads of a new pool would spin until its first run, while another shard needs the cores.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        weights: list[Value] = []
        if shard.weights is not None:
            offset = shard.weights.offset
            weights = [to_value(tensor_in(parts, spec, offset), spec.dtype) for spec in shard.tensors]
        self._borrowed: list[Value] = []
        if packed:
            # onnxruntime copies these values: nothing of the buffers is needed once the session is made.
            options.add_external_initializers([spec.name for spec in shard.tensors], weights)
        else:
            options.add_session_config_entry("session.disable_prepacking", "1")
            self._borrowed = weights
            for spec, value in zip(shard.tensors, weights, strict=True):
                options.add_initializer(spec.name, value)
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen exception types without a common base
            raise LoadError(f"onnxruntime refused shard '{shard.name}' ({graph.name}): {_first_line(error)}") from error

    def run(self, inputs: Mapping[str, Value], stopper: Stopper) -> Sequence[Value]:
        """Run the shard. Returns its outputs, in the order of `Shard.outputs`.

        Raises:
            RunError: onnxruntime failed.
            ClosedError: the stopper was used.
        """
        try:
            result: Sequence[Value] = self._session.run_with_ort_values(self._outputs, dict(inputs), stopper._options)
        except Exception as error:
            if stopper.stopped:
                raise ClosedError(f"The call was ended while shard '{self._name}' ran.") from error
            raise RunError(f"Shard '{self._name}' failed: {_first_line(error)}") from error
        return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
