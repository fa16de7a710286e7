"""A failure in any agent reaches the caller as it is, and the next call works."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    agents,
)
from tests.engine.pipeline.rig import (
    FAILURES,
    NotingStorage,
    Rig,
    Scripted,
    fail_once,
    failing_sessions,
    plan_by_hand,
    raising,
    rigged,
)

from pipeload.errors import ClosedError, LoadError, RunError, ShardError
from pipeload.format import manifest as manifests
from pipeload.pipeline import loader as loaders
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.session import to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs
from pipeload.storage.buffers import Buffer
from pipeload.tracing.trace import Progress


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
@pytest.mark.parametrize("resident", [(), ("block.003",)])
def test_a_failed_read_reaches_the_caller_and_the_next_call_works(
    toy: Path, error: BaseException, at: str, resident: tuple[str, ...]
) -> None:
    with rigged(toy, resident=resident) as rig:
        rig.storage.before_read = fail_once(error, at)
        with raising(error, LoadError):
            rig.check(passes=3)
        rig.check(passes=2)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["make", "run"])
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
def test_a_failed_session_reaches_the_caller_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, at: str
) -> None:
    monkeypatch.setattr(loaders, "ShardSession", failing_sessions(method, error, at))
    with rigged(toy) as rig:
        with raising(error, LoadError if method == "make" else RunError):
            rig.check(passes=3)
        rig.check(passes=2)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_while_freeing_closes_with_its_cause(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    armed = [True]
    with rigged(toy) as rig:
        pool = rig.pipeline._memory._pool

        def give(buffer: Buffer) -> None:
            if armed and threading.current_thread().name == "pipeload-daemon":
                armed.clear()
                raise error
            buffer.close()

        monkeypatch.setattr(pool, "give", give)
        for _ in range(2):
            with pytest.raises(ClosedError) as caught:
                rig.check(passes=3)
            assert caught.value.__cause__ is error


def test_a_model_that_vanished_is_not_tried_again_until_somebody_calls(toy_copy: Path) -> None:
    tries: list[str] = []
    with rigged(toy_copy, loaders=2) as rig:
        rig.check()
        rig.storage.before_read = lambda shard: tries.append(shard.name)
        (toy_copy / "shards").rename(toy_copy / "away")
        for _ in range(3):
            with pytest.raises(ShardError, match="cannot be read"):
                rig.check(passes=3)
        (toy_copy / "away").rename(toy_copy / "shards")
        with suppress(ShardError):
            # A load that was tried ahead, before the files came back, may fail once more.
            rig.check()
        rig.check()
    assert len(tries) < 60


def test_a_load_that_fails_gives_its_reservation_back(toy_copy: Path) -> None:
    with rigged(toy_copy, buffers=1) as rig:
        path = toy_copy / "shards" / "block.002.safetensors"
        content = path.read_bytes()
        for _ in range(10):
            path.write_bytes(content[:-1])
            with pytest.raises(ShardError, match=r"block\.002\.safetensors"):
                rig.check(passes=2)
            path.write_bytes(content)
            with suppress(ShardError):
                rig.check()
            rig.check()


def test_a_thread_that_cannot_start_leaves_none_behind(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start
    calls = iter(range(10))

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeload-") and next(calls) == 2:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(LoadError, match=r"can't start new thread\. Raise the limit"):
        Rig(toy)
    assert agents() == []


def test_memory_that_lacks_for_a_thread_is_told_as_that(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    # Of a thread's stack alone: buffers get theirs.
    maps = SimpleNamespace(mmap=refused, MAP_PRIVATE=mmap.MAP_PRIVATE, MAP_ANONYMOUS=mmap.MAP_ANONYMOUS)
    monkeypatch.setattr("pipeload.machine.threads.mmap", maps)
    with pytest.raises(LoadError, match=r"Cannot allocate memory.*ulimit -a") as found:
        Rig(toy)
    assert "ulimit -u" not in str(found.value)
    assert agents() == []


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_error_in_the_progress_callback_reaches_the_caller(toy: Path, error: BaseException) -> None:
    armed = [True]

    def fail(progress: Progress) -> None:
        if armed and progress.index == 4:
            armed.clear()
            raise error

    with rigged(toy, progress=fail, resident=("block.002",)) as rig:
        with pytest.raises(type(error)) as caught:
            rig.run()
        assert caught.value is error
        rig.check(passes=2)


def test_a_shard_that_onnxruntime_refuses_is_named(toy_copy: Path) -> None:
    manifest = manifests.read(toy_copy)
    shards = list(manifest.shards)
    path = toy_copy / shards[2].graph.path
    content = path.read_bytes().replace(b"MatMul", b"MatMux")
    assert content != path.read_bytes()
    path.write_bytes(content)
    # A whole graph with the right hash, weights and outputs, so only onnxruntime can notice.
    shards[2] = replace(shards[2], graph=replace(shards[2].graph, sha256=hashlib.sha256(content).hexdigest()))
    manifest = replace(manifest, shards=tuple(shards))
    plan = plan_by_hand(manifest)
    pipeline = Pipeline(manifest, NotingStorage(toy_copy, manifest), plan, Scripted(manifest, lambda *_: plan))
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        for _ in range(2):
            with pytest.raises(LoadError, match=r"refused shard 'block\.001'"):
                pipeline.submit(Feed(pieces=[values]), Needs()).result()
    finally:
        pipeline.close()
    assert pipeline._memory.reservations.reserved_bytes == 0
