"""Profiles survive a file and the store, and are found only where they were measured."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeload.errors import ConfigError
from pipeload.machine.memory import rss_bytes
from pipeload.measuring import profile_store
from pipeload.measuring.profile_store import find, identify, keep, read, write
from pipeload.planning.profile import Profile, ShardTimes

DIMS = {"batch_size": 1, "sequence_length": 8}
TIMES = ShardTimes(session_s=0.1, run_s=0.2, loading_run_s=0.3, pack_s=0.4, packed_run_s=0.15)
PROFILE = Profile(
    process_bytes=1,
    cores=2,
    read_bytes_per_s={1: 1e9, 2: 2e9},
    cached_read_bytes_per_s={1: 5e8},
    read_bytes_per_s_by_request={1 << 20: 1e9},
    dims=DIMS,
    times={1: {"block.000": TIMES}, 2: {"block.000": TIMES}},
    runtime_bytes=10,
    activation_bytes=20,
    cache_bytes_per_token=30,
)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PIPELOAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pipeload" / "profiles"


def test_a_profile_with_times_and_bandwidth_was_measured() -> None:
    assert PROFILE.measured
    assert not replace(PROFILE, times={}).measured
    assert not replace(PROFILE, read_bytes_per_s={}).measured


def test_a_file_has_all_but_what_the_process_occupied(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    write(PROFILE, path)
    assert "process_bytes" not in path.read_text()
    found = read(path)
    assert found == replace(PROFILE, process_bytes=found.process_bytes)
    # That of this process instead, which changes a little from moment to moment.
    assert 0.5 * rss_bytes() < found.process_bytes < 2 * rss_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["profile"].update(cores="two"), "cores"),
        (lambda content: content["profile"].pop("cores"), "cores"),
        (lambda content: content["profile"].update(cores=0), "no cores"),
        (lambda content: content["profile"]["read_bytes_per_s"].update({"2": 0}), "reads by 2 have 0.0 bytes/s"),
        (lambda content: content["profile"]["times"]["2"]["block.000"].update(run_s=-1), "shard 'block.000' with 2"),
        (lambda content: content["profile"].update(runtime_bytes=-1), "negative"),
        (lambda content: content.pop("profile"), "profile"),
        (lambda content: content.update(format=2), "has format 2; this pipeload reads format 1"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault_and_a_remedy(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "one.json"
    write(PROFILE, path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"one\.json.*{message}.*pipeload profile"):
        read(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_of_a_profile_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        read(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "missing.json")


def test_a_kept_profile_that_is_a_pipe_or_endless_is_as_good_as_none(toy: Path, own_store: Path) -> None:
    path = keep(toy, PROFILE)
    path.unlink()
    os.mkfifo(path)
    assert find(toy, DIMS) is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert find(toy, DIMS) is None
    with pytest.raises(ConfigError, match=r"holds more than the 4\.2 MB"):
        read(path)


def test_what_was_kept_is_found_again(toy: Path, own_store: Path) -> None:
    assert find(toy, DIMS) is None
    path = keep(toy, PROFILE)
    assert path is not None
    assert path.parent == own_store
    assert [path] == list(own_store.iterdir())
    found = find(toy, DIMS)
    assert found is not None
    assert found == replace(PROFILE, process_bytes=found.process_bytes)


def test_the_file_says_in_clear_what_it_was_measured_with(toy: Path) -> None:
    path = keep(toy, PROFILE)
    assert path is not None
    identity = json.loads(path.read_text())["identity"]
    assert identity["dims"] == DIMS
    assert identity["cores"] == identify(toy, DIMS).cores
    assert set(identity["software"]) == {"numpy", "onnxruntime", "pipeload"}
    assert len(identity["model"]) == 64


def test_another_size_model_machine_or_version_has_no_profile(
    toy: Path, toy_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(toy, PROFILE)
    assert find(toy, DIMS | {"sequence_length": 9}) is None
    assert find(toy_decoder, DIMS) is None
    for name, value in (
        ("cpu_name", "another"),
        ("cores", 77),
        ("memory_bytes", 1),
        ("device_of", "0:0"),
        ("read_limits", "io.max 8:0 rbps=1"),
        ("_version", "9"),
    ):
        with monkeypatch.context() as context:
            context.setattr(profile_store, name, lambda *_, value=value: value)
            assert find(toy, DIMS) is None, name
    assert find(toy, DIMS) is not None


def test_a_file_under_the_name_of_another_is_ignored(toy: Path) -> None:
    path = keep(toy, PROFILE)
    assert path is not None
    content = json.loads(path.read_text())
    content["identity"]["cores"] = 77
    path.write_text(json.dumps(content))
    assert find(toy, DIMS) is None
    del content["identity"]
    path.write_text(json.dumps(content))
    assert find(toy, DIMS) is None


def test_a_damaged_file_in_the_store_is_ignored_and_replaced(toy: Path) -> None:
    path = keep(toy, PROFILE)
    assert path is not None
    path.write_text("{")
    assert find(toy, DIMS) is None
    assert keep(toy, PROFILE) == path
    assert find(toy, DIMS) is not None


def test_a_store_that_cannot_be_written_harms_nobody(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, but not even root can make a folder in a file.
    (tmp_path / "cache").write_text("a file")
    assert keep(toy, PROFILE) is None
    assert find(toy, DIMS) is None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert keep(toy, PROFILE) is None
    assert find(toy, DIMS) is None


def test_a_model_that_is_not_there_has_no_profile(tmp_path: Path) -> None:
    assert keep(tmp_path / "missing", PROFILE) is None
    assert find(tmp_path / "missing", DIMS) is None


def test_writers_at_the_same_time_leave_one_whole_file(toy: Path, own_store: Path) -> None:
    threads = [threading.Thread(target=keep, args=(toy, PROFILE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(own_store.iterdir())) == 1
    assert find(toy, DIMS) is not None
