"""A quota of processors counts wherever it stands: at the process's own cgroup or above it, in v1 and v2."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from pipeload.machine import hardware
from pipeload.machine.cgroups import cpu_quota


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _quota(tmp_path: Path, membership: str) -> float:
    _write(tmp_path / "membership", membership)
    return cpu_quota(tmp_path / "membership", tmp_path / "root")


def test_a_quota_of_a_service_is_found_below_the_root(tmp_path: Path) -> None:
    _write(tmp_path / "root/system.slice/my.service/cpu.max", "150000 100000\n")
    assert _quota(tmp_path, "0::/system.slice/my.service\n") == 1.5


def test_the_least_quota_of_a_cgroup_and_its_parents_counts(tmp_path: Path) -> None:
    _write(tmp_path / "root/a/cpu.max", "200000 100000\n")
    _write(tmp_path / "root/a/b/cpu.max", "300000 100000\n")
    _write(tmp_path / "root/a/b/c/cpu.max", "max 100000\n")
    _write(tmp_path / "root/a/other/cpu.max", "1000 100000\n")
    assert _quota(tmp_path, "0::/a/b/c\n") == 2


def test_a_quota_of_version_1_is_found(tmp_path: Path) -> None:
    _write(tmp_path / "root/cpu/docker/x/cpu.cfs_quota_us", "50000\n")
    _write(tmp_path / "root/cpu/docker/x/cpu.cfs_period_us", "100000\n")
    _write(tmp_path / "root/cpu/cpu.cfs_quota_us", "-1\n")
    _write(tmp_path / "root/cpu/cpu.cfs_period_us", "100000\n")
    assert _quota(tmp_path, "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n") == 0.5


def test_inside_a_container_the_mount_itself_is_the_cgroup(tmp_path: Path) -> None:
    _write(tmp_path / "root/cpu.max", "100000 100000\n")
    assert _quota(tmp_path, "0::/docker/0123/not/mounted\n") == 1


@pytest.mark.parametrize("text", ["max 100000\n", "", "x y\n", "100000 0\n", "100000\n", "-1 100000\n"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "root/cpu.max", text)
    assert _quota(tmp_path, "0::/\n") == math.inf
    assert _quota(tmp_path, "garbage\n") == math.inf
    assert cpu_quota(tmp_path / "missing", tmp_path / "root") == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.0, 1), (1.2, 2), (math.inf, 3), (64.0, 3)])
def test_cores_are_those_of_the_affinity_and_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert hardware.cores() == expected
