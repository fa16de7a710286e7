"""A damaged shard is named through the whole engine, and never used."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    Background,
    assert_close,
    assert_same,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    PLENTY,
    THREADS,
    load,
)

import pipeload
from pipeload.storage import buffers
from pipeload.storage import stamps as stamping


def test_files_are_hashed_once_for_all_processes_and_damage_is_still_found(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stamping.time.time_ns
    monkeypatch.setattr(stamping, "time", SimpleNamespace(time_ns=lambda: real() + 10**12))
    with load(toy_copy, smallest_budget(toy_copy)) as model:
        for _ in range(2):
            model.run(toys.inputs())
    with monkeypatch.context() as patch:
        patch.setattr("pipeload.storage.weights.hashlib", None)
        with load(toy_copy, smallest_budget(toy_copy)) as model:
            model.run(toys.inputs())
    path = toy_copy / "shards" / "block.003.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    os.utime(path, ns=times)
    with load(toy_copy, smallest_budget(toy_copy)) as model:
        with pytest.raises(pipeload.ShardError, match=r"block\.003\.safetensors' is damaged"):
            model.run(toys.inputs())
    with load(toy_copy, smallest_budget(toy_copy), verify=False) as model:
        model.run(toys.inputs())


@pytest.mark.parametrize("packed", [False, True], ids=["streamed", "packed"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
        lambda path: shutil.copy(path.with_name("block.002.safetensors"), path),
    ],
    ids=["missing", "truncated", "grown", "flipped", "foreign"],
)
def test_a_damaged_shard_is_named_and_never_used(toy_copy: Path, damage: Callable[[Path], None], packed: bool) -> None:
    path = toy_copy / "shards" / "block.003.safetensors"
    whole = path.read_bytes()
    damage(path)
    with load(toy_copy, PLENTY if packed else smallest_budget(toy_copy)) as model:
        assert model.plan.packed is packed
        for _ in range(2):
            with pytest.raises(pipeload.ShardError, match=r"'shards/block\.003\.safetensors'"):
                model.run(toys.inputs())
        path.write_bytes(whole)
        # A load that was tried ahead may have failed once more before the file was whole.
        answers = [Background(model.run, toys.inputs()) for _ in range(2)]
        answers[0].wait()
        assert_close(answers[1].end(), run_sequentially(toy_copy, toys.inputs(), threads=THREADS), 1e-5)


def test_a_shard_truncated_between_two_passes_is_named(toy_copy: Path) -> None:
    path = toy_copy / "shards" / "block.003.safetensors"
    with load(toy_copy, smallest_budget(toy_copy), loaders=1) as model:
        model.run(toys.inputs())
        os.truncate(path, 5000)
        # It may have been read ahead before.
        outcomes = [Background(model.run, toys.inputs()).wait() for _ in range(3)]
        words = [str(error) for error in outcomes if isinstance(error, pipeload.ShardError)]
        assert words
        assert all("'shards/block.003.safetensors' has 5000 bytes" in text for text in words)


def test_memory_that_the_system_refuses_is_named_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        # Of buffers alone: threads need memory, too.
        patch.setattr(buffers, "mmap", SimpleNamespace(**{**vars(mmap), "mmap": refuse}))
        with load(toy, smallest_budget(toy)) as model:
            with pytest.raises(pipeload.LoadError, match=r"no memory for a buffer of \d+ bytes"):
                model.run(toys.inputs())
            patch.undo()
            assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
