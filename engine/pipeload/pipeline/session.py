"""One shard's ONNX Runtime session over borrowed buffers. The only module that imports onnxruntime.

Shards are optimised when they are exported, so sessions are made with optimisation off. A streamed shard borrows
its weights from buffers, without a copy and without prepacking, and takes a millisecond or two to make. A packed
session lays them out for the CPU, in memory of its own, which costs far more and makes each run faster. If it is to
outlive the buffers, it has copies of all other weights as well.

Sessions allocate and free activations at every operator. For models without caches they share one arena, which keeps
freed memory for the next operator of any shard: the system must clear memory that went back to it before its next use,
which takes a third of the computing time. Caches grow by a token a pass, so that no piece of an arena would ever fit
the next pass: sessions of models with caches use the C library's heap.

The arena is onnxruntime's process-wide one, which serves only sessions that ask for it. This module touches no other
process-wide state: every session has its own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

from pipeload.errors import ClosedError, LoadError, RunError
from pipeload.foreign import first_line
from pipeload.format.manifest import Shard
from pipeload.machine.heap import reused
from pipeload.machine.threads import THREADS_REMEDY
from pipeload.storage.buffers import Part, tensor_in
from pipeload.storage.weights import GraphFile

__all__ = ["ShardSession", "Stopper", "Value", "shrink_arena", "to_array", "to_value"]

Value: TypeAlias = ort.OrtValue
"""A tensor in onnxruntime's memory, which travels between shards without a copy."""

_BFLOAT16 = 16
"""ONNX's number for an element type that NumPy does not have."""
_PROVIDERS = ["CPUExecutionProvider"]
_FOLDER = "session.model_external_initializers_file_folder_path"
"""Of a graph that is given as bytes: where the files lie that it names."""
_AFFINITIES = "session.intra_op_thread_affinities"
_SPIN_US = 50
_ARENA_LOCK = threading.Lock()
_SAME_AS_REQUESTED = 1
_SHRINK = "memory.enable_memory_arena_shrinkage"
_REFUSED_REMEDY = "Raise the limits of the process (ulimit -a), or export the model again with this onnxruntime."
_FAILED_REMEDY = "Check the inputs, and the limits of the process (ulimit -a)."
_CONSTANT_GRAPH = (
    b'\x08\x08\x12\x00:6\n$\x12\x01y"\x08Constant*\x15\n\x0bvalue_float\x15\x00\x00\x00\x00\xa0\x01\x01\x12'
    b"\x01gb\x0b\n\x01y\x12\x06\n\x04\x08\x01\x12\x00B\x04\n\x00\x10\x11"
)
"""An ONNX model (opset 17) that makes the number 0: only a session can tell the arena to shrink."""


def to_value(array: NDArray[Any], dtype: str | None = None) -> Value:
    """A value that borrows a C-contiguous array; the array must not change while the value lives."""
    array = np.asarray(array, order="C")
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_array(value: Value) -> NDArray[Any]:
    """The value as an array over the same memory, which keeps the value alive while the array lives."""
    array: NDArray[Any] = np.asarray(_Owner(value))
    return array


class _Owner:
    """Base of an array over a value. onnxruntime's own arrays do not keep the memory alive that a value borrows."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self.__array_interface__ = value.numpy().__array_interface__


class Stopper:
    """Ends the session that runs under it, from any thread.

    Attributes:
        stopped: it was used.
        then: called when it is used.
    """

    def __init__(self) -> None:
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4
        # The CPU has no such graphs, but onnxruntime's Python asks in each run, and "not there" is an exception: 44 us.
        self._options.add_run_config_entry("gpu_graph_id", "0")
        self.stopped = False
        self.then: Callable[[], object] | None = None

    def stop(self) -> None:
        """Make the running session, and every later one, fail."""
        self.stopped = True
        self._options.terminate = True
        if self.then is not None:
            self.then()


def shrink_arena() -> None:
    """Give the unused pieces of the shared arena back to the heap; see `heap.trim`.

    Where onnxruntime fails to, the arena keeps them, and they count as memory of the process.
    """
    with suppress(Exception):
        _shrinker().run(None, {}, _shrinking())


@cache
def _register_arena() -> None:
    # Pieces of exactly the requested sizes: an arena that grows by doubling would take up to twice as much.
    config = {
        "arena_extend_strategy": _SAME_AS_REQUESTED,
        "max_mem": 0,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(config))


def _use_arena(options: ort.SessionOptions) -> None:
    with _ARENA_LOCK:  # a second arena would replace the first
        _register_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Packed weights live and die with their session, and would leave holes in the arena.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


@cache
def _shrinker() -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    _use_arena(options)
    return ort.InferenceSession(_CONSTANT_GRAPH, options, providers=_PROVIDERS, enable_fallback=0)


@cache
def _shrinking() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(_SHRINK, "cpu:0")
    return options


class ShardSession:
    """A shard that is ready to run.

    Args:
        shard: its record in the manifest.
        graph: its graph.
        parts: memory that holds all of its weights. It must stay unchanged until the session is gone, unless that has
            copies.
        threads: intra-op threads.
        packed: lay the weights out for the CPU, in memory of the session's own.
        copied: copy what a packed session needs of the buffers.
        arena: keep activations in the arena that all such sessions share. The outputs of a run lie in it too.
        cores: logical processors for its threads beside the one that runs it; none for those of the calling thread.

    Raises:
        LoadError: onnxruntime refused the graph, or the process has no memory or thread left for it.
    """

    def __init__(
        self,
        shard: Shard,
        graph: GraphFile,
        parts: Sequence[Part],
        threads: int,
        *,
        packed: bool = False,
        copied: bool = False,
        arena: bool = False,
        cores: Collection[int] = (),
    ) -> None:
        self._name = shard.name
        self._outputs = list(shard.outputs)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        if arena:
            _use_arena(options)
        else:
            # An arena per session would round up every block of memory and keep it.
            options.enable_cpu_mem_arena = False
        # Threads spin briefly while they wait for the next operator: other shards and the Loading Agents need the
        # cores, and by default the threads of a new pool would keep one busy until its first run.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        if cores and threads > 1:
            # Of each thread; onnxruntime counts processors from 1.
            each = ",".join(str(core + 1) for core in sorted(cores))
            options.add_session_config_entry(_AFFINITIES, ";".join([each] * (threads - 1)))
        names = [spec.widened or spec.name for spec in shard.tensors]
        weights: list[Value] = []
        if shard.weights is not None:
            offset = shard.weights.offset
            weights = [to_value(tensor_in(parts, spec, offset), spec.memory_dtype) for spec in shard.tensors]
        self._borrowed: list[Value] = []
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if copied:
            options.add_external_initializers(names, weights)
        else:
            self._borrowed = weights
            for name, value in zip(names, weights, strict=True):
                options.add_initializer(name, value)
        options.add_session_config_entry(_FOLDER, str(graph.path.parent))
        try:
            # Without onnxruntime's fallback, which would try once more, and print "EP Error" to stdout.
            # The next shard that is streamed packs into the memory of this one.
            with reused() if packed and not copied else nullcontext():
                self._session = ort.InferenceSession(graph.data, options, providers=_PROVIDERS, enable_fallback=0)
            # Kept for the fallback.
            self._session._model_bytes = None
        except Exception as error:  # onnxruntime has a dozen exception types without a common base
            if "pthread_create" in str(error):
                raise LoadError(
                    f"No thread to compute shard '{shard.name}' can be started. Load the model with threads=1. "
                    f"{THREADS_REMEDY}"
                ) from error
            raise LoadError(
                f"onnxruntime refused shard '{shard.name}' ({graph.path.name}): {first_line(error)}. {_REFUSED_REMEDY}"
            ) from error

    def run(
        self, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value] | None = None
    ) -> Sequence[Value]:
        """Run the shard. Returns its outputs, in the order of `Shard.outputs`.

        Args:
            inputs: by name.
            stopper: ends the run when it is used.
            in_place: outputs written over an input: their names, with that input's value.

        Raises:
            RunError: onnxruntime failed.
            ClosedError: the stopper was used.
        """
        try:
            if in_place:
                return self._run_in_place(inputs, stopper, in_place)
            made = self._session.run_with_ort_values(self._outputs, dict(inputs), stopper._options)
        except Exception as error:
            if stopper.stopped:
                raise ClosedError(f"The call was ended while shard '{self._name}' ran.") from error
            raise RunError(f"Shard '{self._name}' failed: {first_line(error)}. {_FAILED_REMEDY}") from error
        return _apart(made)

    def _run_in_place(
        self, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value]
    ) -> Sequence[Value]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            if name in in_place:
                binding.bind_ortvalue_output(name, in_place[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding, stopper._options)
        made = zip(self._outputs, _apart(binding.get_outputs()), strict=True)
        return [in_place.get(name, value) for name, value in made]


def _apart(values: Sequence[Value]) -> list[Value]:
    """The same values, each in a list of its own: all values of onnxruntime's list stay in memory while one is used."""
    apart = []
    for value in values:
        alone = OrtValueVector()
        alone.push_back(value._get_c_value())
        apart.append(ort.OrtValue(alone[0]))
    return apart
