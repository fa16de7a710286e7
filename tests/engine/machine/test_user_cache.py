"""The cache's folder, and the files kept in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.engine import toy as toys

import pipeload
from pipeload.machine.user_cache import keep_file, user_cache
from pipeload.measuring import profile_store


def test_an_own_folder_comes_first_then_the_users_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPELOAD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache("verified") == tmp_path / "own" / "verified"
    monkeypatch.delenv("PIPELOAD_CACHE")
    assert user_cache("verified") == tmp_path / "xdg" / "pipeload" / "verified"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache("verified") == tmp_path / "home" / ".cache" / "pipeload" / "verified"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert user_cache("verified") == tmp_path / "home" / ".cache" / "pipeload" / "verified"
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_no_cache_and_can_still_load(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    def homeless(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PIPELOAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert user_cache("verified") is None
    with pipeload.load(toy, "8GB") as model:
        for _ in range(3):
            model.run(toys.inputs())
        assert profile_store.keep(toy, model.profile) is None
    assert profile_store.find(toy, {}) is None


def test_a_user_whom_the_system_does_not_know_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: type[Path]) -> Path:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("PIPELOAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert user_cache("verified") is None


def test_tests_do_not_write_into_the_users_own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert tmp_path_factory.getbasetemp() in user_cache("x").parents


def test_a_file_is_made_with_its_folders_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    for data in (b"one", b"two"):
        keep_file(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    # Root may write everywhere, but not even root can make a folder in a file.
    (tmp_path / "file").write_bytes(b"one")
    keep_file(tmp_path / "file" / "deeper", b"two")
    assert (tmp_path / "file").read_bytes() == b"one"


def test_a_pipe_in_the_place_of_a_kept_file_is_replaced_and_nothing_waits_for_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    keep_file(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"
