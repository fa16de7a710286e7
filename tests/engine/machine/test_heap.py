"""The heap gives memory back where the C library can be told to."""

from __future__ import annotations

from typing import Any

import pytest

from pipeload.machine import heap


def test_limiting_the_heap_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise OSError("no C library")

    monkeypatch.setattr(heap.ctypes, "CDLL", refuse)
    heap.limit_heap()


def test_trimming_is_harmless_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.trim()
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.trim()
