"""Limits of cgroups are found in both versions, in and outside of containers."""

from __future__ import annotations

from pathlib import Path

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


def test_inside_a_container_the_mount_itself_is_the_cgroup(tmp_path: Path) -> None:
    _v1(tmp_path, "/", limit=500, usage=300, cache=50)
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/docker/0123456789\n")
    assert list(cgroups.memory_limits(membership, tmp_path)) == [(500, 250)]


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    assert list(cgroups.memory_limits(tmp_path / "missing", tmp_path)) == []
