"""The machine's description of itself, on x86 and Arm, in and outside of containers."""

from __future__ import annotations

import os
from pathlib import Path

from pipeload.machine.cgroups import read_limits
from pipeload.machine.hardware import cores, cpu_name, device_of, memory_bytes


def test_this_machine_has_cores_memory_and_a_device(tmp_path: Path) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert memory_bytes() > 0
    assert memory_bytes() % 100_000_000 == 0
    number = tmp_path.stat().st_dev
    assert device_of(tmp_path) == f"{os.major(number)}:{os.minor(number)}"
    assert device_of(tmp_path / "missing") == ""


def test_a_processor_is_named_by_its_model_or_on_arm_by_its_designs(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n")
    assert cpu_name(cpuinfo) == "AMD EPYC"
    cpuinfo.write_text("processor : 0\nCPU part\t: 0xd05\n\nprocessor : 1\nCPU part\t: 0xd05\nCPU part\t: 0xd0b\n")
    assert cpu_name(cpuinfo) == "0xd05, 0xd0b"
    assert isinstance(cpu_name(tmp_path / "missing"), str)


def test_rules_that_throttle_reading_are_found_in_both_versions_of_cgroups(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "cgroup"
    membership.write_text("3:blkio,other:/docker/one\n2:cpu:/\n0::/user/two\n")
    for folder, name, text in (
        ("blkio/docker", "blkio.throttle.read_bps_device", "254:0 400000000\n"),
        ("blkio/docker/one", "blkio.throttle.read_iops_device", "8:0 100\n"),
        ("blkio/other", "blkio.throttle.read_bps_device", "1:0 1\n"),
        ("user/two", "io.max", "8:16 rbps=2097152 wbps=max riops=max wiops=max\n"),
        ("cpu", "io.max", "9:9 rbps=1\n"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(text)
    assert read_limits(membership, root).split("; ") == [
        "blkio.throttle.read_bps_device 254:0 400000000",
        "blkio.throttle.read_iops_device 8:0 100",
        "io.max 8:16 rbps=2097152 wbps=max riops=max wiops=max",
    ]


def test_without_cgroups_nothing_is_throttled(tmp_path: Path) -> None:
    assert read_limits(tmp_path / "missing", tmp_path) == ""
    membership = tmp_path / "membership"
    membership.write_text("0::/\n")
    assert read_limits(membership, tmp_path) == ""
