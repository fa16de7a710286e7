"""Bars of long work show bytes and the time that is left; the clock is the test's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeload.cli import progress as module
from pipeload.cli.progress import progress_bars


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def drawn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What is on the terminal at the end."""
    terminal = io.StringIO()
    options = {"force_terminal": True, "width": 120, "get_time": clock, "color_system": None}
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=terminal, **options))
    return lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()[-1]


def test_bytes_and_time_left(clock: Clock, drawn: Callable[[], str]) -> None:
    with progress_bars() as progress:
        for done in range(0, 400, 16):
            progress("write the shards", done * 10**6, 1600 * 10**6)
            clock.now_s += 2
    line = drawn()
    assert "write the shards" in line
    assert "0.4/1.6 GB" in line
    assert "0:02:32" in line, "1216 MB at 8 MB/s"


def test_a_pause_between_two_files_is_no_new_speed(clock: Clock, drawn: Callable[[], str]) -> None:
    with progress_bars() as progress:
        for done in range(0, 400, 40):
            progress("write the shards", done * 10**6, 1600 * 10**6)
            clock.now_s += 1
        clock.now_s += 49
        for done in range(400, 800, 40):
            progress("write the shards", done * 10**6, 1600 * 10**6)
            clock.now_s += 1
    assert "0:01:1" in drawn(), "760 MB took 68 s, so 840 MB take 75 s"


def test_a_step_of_unknown_length_has_neither(clock: Clock, drawn: Callable[[], str]) -> None:
    with progress_bars() as progress:
        progress("export to ONNX", 0, 0)
        clock.now_s += 5
        progress("export to ONNX", 0, 0)
    assert not re.search(r"[kMG]B|%|\d:\d", drawn())
