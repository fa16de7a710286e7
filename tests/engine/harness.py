"""Shared by the engine's tests: gates, the sequential reference, budgets that are known to work."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeload
from pipeload.format import manifest as manifests
from pipeload.format.placement import place
from pipeload.pipeline.session import ShardSession, to_array, to_value
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage
from pipeload.storage.widening import widen

EMULATED = os.environ.get("PIPELOAD_EMULATED") == "1"
PATIENCE_S = 900 if EMULATED else 60
"""How long anything may take before a test calls it a hang."""

Arrays = Mapping[str, NDArray[Any]]


@contextmanager
def no_descriptors() -> Iterator[None]:
    """A context in which this process cannot open another file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Gate:
    """A place where a thread stops until the test lets it go on."""

    def __init__(self, *, opened: bool = False) -> None:
        self._reached = threading.Semaphore(0)
        self._open = threading.Event()
        if opened:
            self._open.set()

    def stop_here(self) -> None:
        """For the thread: say that it is here, and wait."""
        self._reached.release()
        assert self._open.wait(PATIENCE_S), "nobody opened the gate"

    def wait_reached(self) -> None:
        """For the test: wait until one more thread is here."""
        assert self._reached.acquire(timeout=PATIENCE_S), "nobody came to the gate"

    def open(self) -> None:
        self._open.set()


class Clock:
    """Stands in for the module `time`: a clock that goes on when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Background(threading.Thread):
    """A call in a thread of its own, which keeps its result or its exception."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        super().__init__(name="test-caller", daemon=True)
        self._call, self._arguments = call, arguments
        self._result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def end(self) -> Any:
        """Wait for the call; its result, or its exception."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._result

    def wait(self) -> BaseException | None:
        """Wait for the call; its exception, if it had one."""
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the call hangs"
        return self.error


def agents() -> list[str]:
    """Names of all agents that live in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pipeload-")]


def decoder_inputs(model: Any, ids: NDArray[np.integer[Any]], past: int = 0) -> dict[str, NDArray[Any]]:
    """The inputs of a decoder's step.

    Args:
        model: of one machine, or of a cluster.
        ids: `[rows, tokens]`.
        past: tokens in the caches.
    """
    rows, tokens = ids.shape
    offered = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
    }
    return {spec.name: offered[spec.name].astype(spec.dtype) for spec in model.inputs}


def run_python(
    program: str,
    *arguments: object,
    exit_code: int = 0,
    given: str = "",
    timeout_s: float = PATIENCE_S,
    traced: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with this one's import path; it must end with that exit code.

    Args:
        program: its text.
        arguments: its own, as text.
        exit_code: see above.
        given: what it reads.
        timeout_s: it must end before.
        traced: `make coverage` traces it.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if not traced:
        environment = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_PROCESS_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        input=given,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done


def figures_of_memory(program: str) -> list[float]:
    """The numbers that a program prints about the memory of its process, in which no tracer has objects of its own."""
    return [float(word) for word in run_python(program, traced=False).stdout.split()]


def smallest_budget(directory: Path, **options: Any) -> int:
    """The smallest budget that works for the model in this process, as the engine names it."""
    try:
        pipeload.load(directory, 1, **options)
    except pipeload.BudgetError as error:
        return error.needed_bytes
    raise AssertionError("a budget of one byte works")


def run_sequentially(directory: Path, inputs: Arrays, *, threads: int) -> dict[str, NDArray[Any]]:
    """The reference: the same shards, one plain session after another, without agents. Left out caches are empty."""
    return run_in_one_sweep(directory, [inputs], threads=threads)[0]


def run_in_one_sweep(directory: Path, calls: Sequence[Arrays], *, threads: int) -> list[dict[str, NDArray[Any]]]:
    """The same for several callers, whom one sweep serves."""
    manifest = manifests.read(directory)
    storage = Storage(directory, manifest)

    @contextmanager
    def borrow(index: int) -> Iterator[ShardSession]:
        shard = manifest.shards[index]
        placement = place(shard, (0, shard.nbytes))
        parts = [Part(0, shard.nbytes, Buffer(placement.nbytes), placement)]
        assert storage.read_weights(shard, parts, lambda: False)
        if placement.places:
            widen(shard, parts)
        yield ShardSession(shard, storage.graph(shard), parts, threads, packed=shard.packed)

    feeds = []
    for inputs in calls:
        dims = manifests.bind_dims(manifest.inputs, {name: array.shape for name, array in inputs.items()})
        dims = {symbol: dims.get(symbol, 0) for symbol in manifest.dims}
        arrays = dict(inputs)
        for spec in manifest.inputs:
            if spec.name not in arrays:
                shape = [manifests.evaluate_dim(dim, dims) for dim in spec.shape]
                arrays[spec.name] = np.zeros(shape, spec.dtype)
        feeds.append(Feed(pieces=[{spec.name: to_value(arrays[spec.name], spec.dtype) for spec in manifest.inputs}]))
    Sweep(manifest, storage).run(feeds, borrow)
    return [{name: to_array(value).copy() for name, value in feed.outputs.items()} for feed in feeds]


def assert_same(actual: Arrays, expected: Arrays) -> None:
    """Equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def assert_close(actual: Arrays, expected: Arrays, share: float) -> None:
    """Equal within a share of each output's range."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        if array.size:
            error = np.abs(actual[name].astype(np.float64) - array).max()
            # Two labels of one image may lie so close together that float32 cannot say more about their distance.
            scale = max(float(np.ptp(array)), float(np.abs(array).max())) or 1.0
            assert error <= share * scale, f"{name} is off by {error}"


def wait_for_calls(model: Any, count: int) -> None:
    """Until this many calls wait in the model's queue."""
    calls = model._pipeline._exchange.calls
    with calls._changed:
        assert calls._changed.wait_for(lambda: len(calls._waiting) >= count, PATIENCE_S)
