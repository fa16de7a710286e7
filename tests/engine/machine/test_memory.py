"""Sizes as people write them, and what the cgroup and the machine leave free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from pipeload.errors import ConfigError
from pipeload.machine import memory


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        ("268435456", 268435456),
        ("256MB", 256_000_000),
        ("256 MiB", 256 * 2**20),
        (" 1.5GB ", 1_500_000_000),
        ("2gib", 2 * 2**30),
        ("100K", 100_000),
        ("0.5KiB", 512),
        ("1TB", 10**12),
        ("77 B", 77),
    ],
)
def test_sizes_are_read_as_people_write_them(text: int | str, nbytes: int) -> None:
    assert memory.parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-1", "1e9", "12 PB", "1.MB", "1,5GB", "iB", "5iB", "nan", "0", "0.4", 0, -5, True, 1.5, None, b"1"],
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="size in bytes"):
        memory.parse_bytes(text)


@pytest.mark.parametrize("text", ["256", " 1 ", "1.5", "999999"])
def test_a_number_that_was_meant_in_megabytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{text}' means {text.strip()} bytes\. Write '{text.strip()}MB'"):
        memory.parse_bytes(text)
    assert memory.parse_bytes("1000000") == memory.parse_bytes("1MB")


@pytest.mark.parametrize("text", ["auto", "AUTO", " Auto "])
def test_an_automatic_budget_may_be_written_in_any_case(text: str) -> None:
    assert memory.parse_budget(text) is None
    assert memory.parse_budget("2MB") == 2_000_000


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (268_435_456, "268.4 MB"), (1_340_000_000, "1.34 GB")],
)
def test_sizes_are_written_in_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert memory.format_bytes(nbytes) == text


def test_rss_follows_what_the_process_touches() -> None:
    before = memory.rss_bytes()
    ballast = np.ones(64 << 20, np.uint8)
    assert 60 << 20 <= memory.rss_bytes() - before <= 80 << 20
    assert memory.peak_rss_bytes() >= before + ballast.nbytes - (4 << 20)


def _v1(root: Path, path: str, *, limit: int, usage: int, cache: int) -> Path:
    place = root / "memory" / path.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (place / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (place / "memory.stat").write_text(f"cache 5\ninactive_file 3\ntotal_inactive_file {cache}\n")
    membership = root / "membership"
    membership.write_text(f"12:pids:/x\n4:cpu,memory:{path}\n0::/\n")
    return membership


def _v2(root: Path, path: str, *, limit: str, usage: int, cache: int) -> Path:
    place = root / path.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.max").write_text(f"{limit}\n")
    (place / "memory.current").write_text(f"{usage}\n")
    (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    membership = root / "membership"
    membership.write_text(f"0::{path}\n")
    return membership


def test_cgroup_v1_limits_are_found_up_to_the_root(tmp_path: Path) -> None:
    _v1(tmp_path, "/", limit=2**63 - 4096, usage=10**9, cache=0)
    _v1(tmp_path, "/outer", limit=900, usage=700, cache=100)
    membership = _v1(tmp_path, "/outer/inner", limit=500, usage=300, cache=50)
    assert list(memory._cgroup_limits(membership, tmp_path)) == [(500, 250), (900, 600)]


def test_cgroup_v2_limits_are_found_up_to_the_root(tmp_path: Path) -> None:
    _v2(tmp_path, "/outer", limit="900", usage=700, cache=100)
    membership = _v2(tmp_path, "/outer/inner", limit="max", usage=300, cache=50)
    assert list(memory._cgroup_limits(membership, tmp_path)) == [(900, 600)]


def test_inside_a_container_the_mount_itself_is_the_cgroup(tmp_path: Path) -> None:
    _v1(tmp_path, "/", limit=500, usage=300, cache=50)
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/docker/0123456789\n")
    assert list(memory._cgroup_limits(membership, tmp_path)) == [(500, 250)]


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    assert list(memory._cgroup_limits(tmp_path / "missing", tmp_path)) == []


def test_auto_takes_less_than_the_smallest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rss = 100_000_000
    monkeypatch.setattr(memory, "rss_bytes", lambda: rss)
    # Of a limit of 400 MB others use 150 MB: 250 MB are left to this process, what it uses already included.
    monkeypatch.setattr(memory, "_cgroup_limits", lambda *_: iter([(400_000_000, rss + 150_000_000), (10**12, 10**9)]))
    assert 225_000_000 <= memory.auto_budget_bytes() < 250_000_000


def test_auto_takes_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cgroup_limits", lambda *_: iter([]))
    assert 0 < memory.auto_budget_bytes() < psutil.virtual_memory().total


def test_auto_is_never_zero_even_in_a_full_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cgroup_limits", lambda *_: iter([(10, 10**12)]))
    assert memory.auto_budget_bytes() >= 0


def test_free_memory_is_looked_up_no_more_often_than_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looked = [1000.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory, "auto_budget_bytes", lambda: looked.append(now[0]) or len(looked))
    monkeypatch.setattr(memory, "_pressed", lambda: False)
    free = memory.FreeMemory()
    assert [free(), free(), free()] == [1, 1, 1]
    now[0] += 60
    assert [free(), free()] == [2, 2]


def test_under_pressure_less_is_free_than_the_process_occupies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "auto_budget_bytes", lambda: 10**12)
    monkeypatch.setattr(memory, "rss_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, "_pressed", lambda: True)
    assert 0.9 * 10**9 < memory.FreeMemory()() < 10**9


@pytest.mark.parametrize(
    ("text", "available", "pressed"),
    [
        ("some avg10=25.00 avg60=1.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", 5, True),
        ("some avg10=5.00 avg60=99.00 avg300=0.00 total=1\n", 5, False),
        ("some avg10=99.00 avg60=99.00 avg300=0.00 total=1\n", 50, False),
        ("", 5, False),
        ("nonsense\n", 5, False),
        (None, 5, False),
    ],
    ids=["waiting", "hardly waiting", "enough free", "empty", "nonsense", "no such file"],
)
def test_pressure_is_waiting_for_memory_while_little_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, available: int, pressed: bool
) -> None:
    if text is not None:
        (tmp_path / "memory").write_text(text)
    monkeypatch.setattr(memory, "_PRESSURE", tmp_path / "memory")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=100))
    assert memory._pressed() is pressed


def test_limiting_the_heap_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise OSError("no C library")

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    memory.limit_heap()


def test_trimming_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.trim()
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.trim()


@pytest.mark.skipif(not memory.reset_peak_rss(), reason="the system does not let a process forget its peak")
def test_a_peak_that_was_reset_begins_with_what_is_occupied_now() -> None:
    held = np.ones(50_000_000, np.uint8)
    with_array = memory.peak_rss_bytes()
    del held
    assert memory.reset_peak_rss()
    assert memory.peak_rss_bytes() < with_array - 25_000_000


def test_a_peak_that_cannot_be_reset_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert memory.reset_peak_rss() is False
