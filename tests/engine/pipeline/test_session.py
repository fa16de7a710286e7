"""One shard in onnxruntime: borrowed weights, borrowed inputs, arrays that outlive their values, clear failures."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tests.engine import toy as toys
from tests.engine.harness import EMULATED, Background, figures_of_memory, no_descriptors

from pipeload.errors import ClosedError, LoadError, RunError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import FileRecord, Shard
from pipeload.machine.heap import trim
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline import session as sessions
from pipeload.pipeline.session import ShardSession, Stopper, shrink_arena, to_array, to_value
from pipeload.storage.buffers import Buffer, Part, tensor_in
from pipeload.storage.weights import GraphFile, Storage


@pytest.fixture
def block(toy: Path) -> tuple[Shard, GraphFile, list[Part]]:
    manifest = manifests.read(toy)
    shard, storage = manifest.shards[1], Storage(toy, manifest)
    parts = [Part(0, shard.nbytes, Buffer(shard.nbytes))]
    assert storage.read_weights(shard, parts, lambda: False)
    return shard, storage.graph(shard), parts


def _inputs() -> dict[str, Any]:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((2, 5, 64), dtype=np.float32)
    return {"hidden.0": hidden, "mask": np.ones((2, 5, 1), np.float32)}


def _run(session: ShardSession, stopper: Stopper | None = None) -> Any:
    values = {name: to_value(array) for name, array in _inputs().items()}
    return to_array(session.run(values, stopper or Stopper())[0])


def test_a_shard_computes_what_its_graph_says(block: Any) -> None:
    shard, graph, parts = block
    assert shard.weights is not None
    w, b = (tensor_in(parts, spec, shard.weights.offset) for spec in shard.tensors)
    hidden = _inputs()["hidden.0"]
    np.testing.assert_allclose(_run(ShardSession(shard, graph, parts, 1)), hidden + np.tanh(hidden @ w + b), atol=1e-6)


def test_a_packed_session_computes_the_same_and_no_longer_needs_its_memory(block: Any) -> None:
    shard, graph, parts = block
    expected = _run(ShardSession(shard, graph, parts, 1))
    packed = ShardSession(shard, graph, parts, 1, packed=True, copied=True)
    buffer = parts[0].buffer
    buffer.piece(0, buffer.nbytes)[:] = bytes(buffer.nbytes)
    parts.clear()
    buffer.close()
    assert buffer._map.closed, "the session holds on to the memory"
    # Packed kernels sum in another order.
    np.testing.assert_allclose(_run(packed), expected, atol=1e-5 * np.abs(expected).max())


def test_a_session_computes_the_same_every_time(block: Any) -> None:
    shard, graph, parts = block
    expected = _run(ShardSession(shard, graph, parts, 2))
    session = ShardSession(shard, graph, parts, 2)
    for _ in range(3):
        np.testing.assert_array_equal(_run(session), expected)


def test_weights_in_several_parts_compute_the_same(block: Any) -> None:
    shard, graph, (whole,) = block
    assert shard.weights is not None
    cut = shard.tensors[1].offset - shard.weights.offset
    parts = [Part(0, cut, Buffer(cut)), Part(cut, shard.nbytes, Buffer(shard.nbytes - cut))]
    for part in parts:
        size = part.end - part.begin
        part.buffer.piece(0, size)[:] = whole.buffer.piece(part.begin, part.end)
    expected = _run(ShardSession(shard, graph, [whole], 1))
    np.testing.assert_array_equal(_run(ShardSession(shard, graph, parts, 1)), expected)


def test_streamed_weights_are_borrowed_and_not_copied(block: Any) -> None:
    shard, graph, parts = block
    session = ShardSession(shard, graph, parts, 1)
    before, buffer = _run(session), parts[0].buffer
    buffer.piece(0, buffer.nbytes)[:] = bytes(buffer.nbytes)
    np.testing.assert_array_equal(_run(session), _inputs()["hidden.0"])
    assert not np.array_equal(before, _inputs()["hidden.0"])


def test_a_session_that_is_gone_lets_its_buffer_go(block: Any) -> None:
    shard, graph, parts = block
    session = ShardSession(shard, graph, parts, 1)
    _run(session)
    buffer = parts[0].buffer
    del session
    # Nothing exports the memory any more, or this would be a BufferError inside and only drop the pages.
    buffer.close()
    assert buffer._map.closed


# The arena that sessions share


_KEPT = """
import sys
from pathlib import Path
import numpy as np
from pipeload.format import manifest as manifests
from pipeload.machine.heap import limit_heap, trim
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline.session import ShardSession, Stopper, shrink_arena, to_value
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage

toy = Path(sys.argv[1])
manifest = manifests.read(toy)
shard, storage = manifest.shards[1], Storage(toy, manifest)
parts = [Part(0, shard.nbytes, Buffer(shard.nbytes))]
assert storage.read_weights(shard, parts, lambda: False)
hidden = np.random.default_rng(0).standard_normal((8, 16384, 64), dtype=np.float32)
values = {"hidden.0": to_value(hidden), "mask": to_value(np.ones((8, 16384, 1), np.float32))}
limit_heap()
for arena in (True, False):
    session = ShardSession(shard, storage.graph(shard), parts, 1, arena=arena)
    shrink_arena()
    trim()
    outputs = session.run(values, Stopper())
    del outputs
    before = rss_bytes()
    shrink_arena()
    trim()
    print(before - rss_bytes())
"""


def test_sessions_in_the_arena_keep_what_they_freed_until_it_shrinks(toy: Path) -> None:
    """Bytes that stay with the process after a run that made 32 MB of activations, and go when the arena shrinks.

    In a process of its own: what other tests have left in the heap would be filled by the run, and stay, too.
    """
    with_arena, without = figures_of_memory(_KEPT.replace("sys.argv[1]", repr(str(toy))))
    assert with_arena > 32 * 2**20
    assert without < 8 * 2**20


def test_sessions_in_the_arena_compute_the_same(block: Any) -> None:
    expected = _run(ShardSession(*block, 1))
    np.testing.assert_array_equal(_run(ShardSession(*block, 1, arena=True)), expected)
    packed = ShardSession(*block, 1, packed=True, arena=True)
    np.testing.assert_allclose(_run(packed), expected, atol=1e-5 * np.abs(expected).max())


def test_a_value_in_the_arena_outlives_its_session_and_the_shrinking(block: Any) -> None:
    session = ShardSession(*block, 1, arena=True)
    array = _run(session)
    expected = array.copy()
    del session
    shrink_arena()
    np.testing.assert_array_equal(array, expected)


def test_an_arena_that_cannot_be_shrunk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MemoryError

    monkeypatch.setattr(sessions, "_shrinker", refuse)
    shrink_arena()


def test_sessions_of_the_host_get_no_part_of_the_arena(toy: Path) -> None:
    shrink_arena()
    graph = toy / manifests.read(toy).shards[1].graph.path
    # A session as anybody else in the process makes it, with an arena of its own, and one without.
    for own_arena in (True, False):
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = own_arena
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        assert np.isfinite(session.run(None, _inputs())[0]).all()


def test_the_graph_that_shrinks_the_arena_is_one_constant() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(sessions._CONSTANT_GRAPH)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Constant"]
    assert not model.graph.input


# Values


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.int64),
        np.array([True, False]),
        np.array([1.5], np.float16),
        np.arange(12).reshape(3, 4).T,
        np.arange(12)[::2],
        np.broadcast_to(np.float32(2), (2, 2)),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_values_come_back_as_they_were(array: Any) -> None:
    back = to_array(to_value(array))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_a_contiguous_array_is_borrowed() -> None:
    array = np.zeros(4, np.float32)
    back = to_array(to_value(array))
    array[:] = 7
    np.testing.assert_array_equal(back, [7, 7, 7, 7])


def test_bfloat16_travels_as_its_bits() -> None:
    value = to_value(np.array([0x3F80], np.uint16), "bfloat16")
    assert value.data_type() == "tensor(bfloat16)"


def test_an_array_keeps_alive_what_its_value_borrowed() -> None:
    source = np.ones(4, np.float32)
    alive = weakref.ref(source)
    value = to_value(source)
    array = to_array(value)
    del source, value
    gc.collect()
    assert alive() is not None, "the array is a dangling pointer"
    row = array[1:3]
    del array
    gc.collect()
    np.testing.assert_array_equal(row, [1, 1])
    del row
    gc.collect()
    assert alive() is None


# Failures


def test_a_graph_that_onnxruntime_refuses_is_named(block: Any, tmp_path: Path) -> None:
    shard, _, parts = block
    with pytest.raises(LoadError, match=r"refused shard 'block.000' \(block.000.onnx\)") as caught:
        ShardSession(shard, GraphFile(tmp_path / "block.000.onnx", b"no graph"), parts, 1)
    assert caught.value.__cause__ is not None


def test_a_process_without_descriptors_is_not_told_to_export_again(block: Any, toy: Path) -> None:
    shard, _, parts = block
    storage = Storage(toy, manifests.read(toy))
    with no_descriptors(), pytest.raises(LoadError) as caught:
        storage.graph(shard)
    assert str(caught.value).startswith(f"'{shard.graph.path}' cannot be read: Too many open files. Raise the limits")
    ShardSession(shard, storage.graph(shard), parts, 1)


@pytest.mark.parametrize("shape", [(32, 128), (4, 64), (64,)])
def test_a_tensor_of_another_shape_than_the_graphs_gives_no_answer(block: Any, shape: tuple[int, ...]) -> None:
    shard, graph, parts = block
    w, b = shard.tensors
    with pytest.raises((LoadError, RunError), match=r"'block\.000'"):
        _run(ShardSession(replace(shard, tensors=(replace(w, shape=shape), b)), graph, parts, 1))


def test_inputs_that_onnxruntime_refuses_are_a_run_error(block: Any) -> None:
    session = ShardSession(*block, 1)
    values = {name: to_value(array[:, :, :1]) for name, array in _inputs().items()}
    with pytest.raises(RunError, match=r"Shard 'block\.000' failed: ") as caught:
        session.run(values, Stopper())
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert _run(session).shape == (2, 5, 64)


def test_a_used_stopper_ends_every_later_run(block: Any) -> None:
    session, stopper = ShardSession(*block, 1), Stopper()
    _run(session, stopper)
    stopper.stop()
    for _ in range(2):
        with pytest.raises(ClosedError, match=r"while shard 'block\.000' ran"):
            _run(session, stopper)
    assert _run(session, Stopper()).shape == (2, 5, 64)


def _bare(tmp_path: Path, name: str, text: str) -> tuple[Shard, Path]:
    """A shard without weights, from onnx's textual form."""
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(
        onnx.parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    record = manifests.FileRecord(path=path.name, nbytes=0, sha256="")
    shard = Shard(
        name=name, role="block", graph=record, weights=None, tensors=(), inputs=("x",), outputs=("y",), structure=""
    )
    return shard, path


def test_a_stopper_ends_a_running_session(tmp_path: Path) -> None:
    # A loop that would go on for hours, and passes a node boundary often.
    body = "body (int64 i, bool c, float[1] x) => (bool d, float[1] y) { d = Identity(c)\n y = Mul(x, x) }"
    shard, path = _bare(
        tmp_path,
        "endless",
        "endless (float[1] x) => (float[1] y) <int64 n = {9000000000000000}, bool go = {1}>"
        f"{{ y = Loop <body = {body}> (n, go, x) }}",
    )
    session, stopper = ShardSession(shard, GraphFile(path, path.read_bytes()), [], 1), Stopper()
    call = Background(session.run, {"x": to_value(np.ones(1, np.float32))}, stopper)
    stopper.stop()
    assert isinstance(call.wait(), ClosedError)


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_without_weights_runs(tmp_path: Path, packed: bool) -> None:
    shard, path = _bare(tmp_path, "double", "double (float[1] x) => (float[1] y) { y = Add(x, x) }")
    session = ShardSession(shard, GraphFile(path, path.read_bytes()), [Part(0, 0, Buffer(0))], 1, packed=packed)
    (result,) = session.run({"x": to_value(np.full(1, 21, np.float32))}, Stopper())
    np.testing.assert_array_equal(to_array(result), [42])


# The host application's own onnxruntime


def test_the_hosts_own_sessions_are_not_touched(block: Any) -> None:
    shard, graph, parts = block
    severity = ort.get_default_logger_severity() if hasattr(ort, "get_default_logger_severity") else None
    before = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    session = ShardSession(shard, graph, parts, 1)
    after = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    expected = _run(session)
    for own in (before, after):
        np.testing.assert_allclose(own.run(None, _inputs())[0], expected, atol=1e-6)
        # Per-session threads are still the default: a global pool would make this session impossible.
        assert own.get_session_options().use_per_session_threads
    if severity is not None:
        assert ort.get_default_logger_severity() == severity


def test_only_the_session_module_imports_onnxruntime() -> None:
    package = Path(str(sessions.__file__)).parents[1]
    importers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "import onnxruntime" in path.read_text()
    }
    # The contenders of the benchmark are other engines.
    assert importers == {"pipeline/session.py", "bench/engines.py"}


def test_sessions_run_in_several_threads_at_once(block: Any) -> None:
    session = ShardSession(*block, 2)
    expected = _run(session)
    barrier = threading.Barrier(4)

    def call() -> Any:
        barrier.wait()
        return _run(session)

    for result in [Background(call) for _ in range(4)]:
        np.testing.assert_array_equal(result.end(), expected)


def test_toys_are_the_same_for_the_same_seed(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    again = toys.make_toy(tmp_path / "again", blocks=6, width=64)
    assert (again / "pipeload.json").read_bytes() == (toy / "pipeload.json").read_bytes()


@pytest.mark.skipif(EMULATED, reason="RSS counts what the emulator holds")
@pytest.mark.measures("memory")
@pytest.mark.parametrize("in_place", [False, True], ids=["run", "in place"])
def test_an_output_that_is_kept_keeps_no_other_one_in_memory(tmp_path: Path, in_place: bool) -> None:
    """A text's caches stay from step to step; the hidden states made with them must not."""
    onnx = pytest.importorskip("onnx")
    nbytes = 128 << 20
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    names = ["cache", "hidden"]
    graph = helper.make_graph(
        [helper.make_node("Neg", ["one"], ["cache"]), helper.make_node("Expand", ["one", "shape"], ["hidden"])],
        "block",
        [helper.make_tensor_value_info("one", floats, [1]), helper.make_tensor_value_info("shape", 7, [1])],
        [helper.make_tensor_value_info(name, floats, ["n"]) for name in names],
    )
    path = tmp_path / "block.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    file = FileRecord(path=path.name, nbytes=path.stat().st_size, sha256="0" * 64)
    shard = Shard(
        name="block",
        role="block",
        graph=file,
        weights=None,
        tensors=(),
        structure="",
        inputs=("one", "shape"),
        outputs=tuple(names),
    )
    session = ShardSession(shard, GraphFile(path, path.read_bytes()), [], 1)
    values = {"one": to_value(np.ones(1, np.float32)), "shape": to_value(np.array([nbytes // 4]))}
    place = {"cache": to_value(np.zeros(1, np.float32))} if in_place else None
    cache, hidden = session.run(values, Stopper(), place)
    before = rss_bytes()
    del hidden
    trim()
    assert before - rss_bytes() > nbytes // 2
    assert to_array(cache).tolist() == [-1.0]


def test_a_pool_of_threads_that_cannot_be_started_says_how_to_do_without_it(
    block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an address space or a number of processes is limited."""
    error = RuntimeError("onnxruntime/core/platform/posix/env.cc:259: pthread_create failed, error code: 11")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(
        LoadError, match=r"No thread to compute shard 'block\.000' .* Load the model with threads=1"
    ) as e:
        ShardSession(*block, 2)
    assert e.value.__cause__ is error
