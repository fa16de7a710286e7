"""Limits of cgroups are found in both versions, in and outside of containers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeload.machine import cgroups


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
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(500, 250), (900, 600)]


def test_cgroup_v2_limits_are_found_up_to_the_root(tmp_path: Path) -> None:
    _v2(tmp_path, "/outer", limit="900", usage=700, cache=100)
    membership = _v2(tmp_path, "/outer/inner", limit="max", usage=300, cache=50)
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(900, 600)]


def test_memory_high_of_v2_is_a_limit(tmp_path: Path) -> None:
    """Above it the kernel lets a process wait, so that it gets no further than at `memory.max`."""
    _v2(tmp_path, "/outer", limit="900", usage=700, cache=100)
    (tmp_path / "outer/memory.high").write_text("800\n")
    membership = _v2(tmp_path, "/outer/inner", limit="max", usage=300, cache=50)
    (tmp_path / "outer/inner/memory.high").write_text("600\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(600, 250), (800, 600)]
    (tmp_path / "outer/inner/memory.high").write_text("max\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(800, 600)]


@pytest.mark.parametrize(
    ("inactive", "active", "mapped", "used"),
    [(100, 0, 0, 600), (100, 300, 0, 300), (100, 300, 150, 450), (100, 300, 350, 600), (500, 400, 0, 0)],
)
def test_page_cache_that_no_process_has_mapped_is_free(
    tmp_path: Path, inactive: int, active: int, mapped: int, used: int
) -> None:
    """Active page cache, too: a file that was read twice. Mapped files are libraries, in the RSS of processes."""
    membership = _v1(tmp_path, "/a", limit=1000, usage=700, cache=inactive)
    with (tmp_path / "memory/a/memory.stat").open("a") as stat:
        stat.write(f"total_active_file {active}\ntotal_mapped_file {mapped}\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(1000, used)]
    membership = _v2(tmp_path, "/a", limit="1000", usage=700, cache=inactive)
    with (tmp_path / "a/memory.stat").open("a") as stat:
        stat.write(f"active_file {active}\nfile_mapped {mapped}\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(1000, used)]


@pytest.mark.parametrize(("folder", "line"), [("pids", "8:pids:/outer/inner\n"), ("", "0::/outer/inner\n")])
def test_threads_that_may_start_are_found_up_to_the_root(tmp_path: Path, folder: str, line: str) -> None:
    def pids(path: str, most: str, current: int) -> None:
        place = tmp_path / folder / path
        place.mkdir(parents=True, exist_ok=True)
        (place / "pids.max").write_text(f"{most}\n")
        (place / "pids.current").write_text(f"{current}\n")

    membership = tmp_path / "membership"
    membership.write_text(line)
    assert cgroups.spare_threads(membership, tmp_path) == math.inf
    pids("outer", "20", 12)
    pids("outer/inner", "max", 5)
    assert cgroups.spare_threads(membership, tmp_path) == 8
    pids("outer/inner", "6", 5)
    assert cgroups.spare_threads(membership, tmp_path) == 1
    pids("outer/inner", "4", 5)
    assert cgroups.spare_threads(membership, tmp_path) == 0


def test_inside_a_container_the_mount_itself_is_the_cgroup(tmp_path: Path) -> None:
    _v1(tmp_path, "/", limit=500, usage=300, cache=50)
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/docker/0123456789\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(500, 250)]


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    assert list(cgroups.memory_limits(tmp_path / "missing", tmp_path)) == []
