"""Slow clients with large bodies: those that the budget has room for are read, the others are told to come again."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from tests.integration.test_serve import folder, served

__all__ = ["folder"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

_BUDGET_BYTES = 250_000_000
_CLIENTS, _BODY_BYTES, _PIECE = 32, 8 << 20, b" " * (64 << 10)
_PATIENCE_S = 500


def _head(nbytes: int) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {nbytes}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def _slow(port: int) -> tuple[asyncio.StreamWriter, bytes]:
    """Send a body but for its last piece, or until an answer comes. Its first line; empty where there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_head(_BODY_BYTES))
    answer = asyncio.ensure_future(reader.readline())
    for _ in range(_BODY_BYTES // len(_PIECE) - 1):
        if answer.done():
            break
        writer.write(_PIECE)
        await writer.drain()
    await asyncio.wait([answer], timeout=0)
    return writer, answer.result() if answer.done() else b""


async def _ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "chat", "prompt": "the cat", "max_tokens": 2}).encode()
    writer.write(_head(len(body)) + body)
    line = await reader.readline()
    writer.close()
    return line


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_the_process_stays_within_its_budget(folder: Path) -> None:
    async def crowd(port: int) -> None:
        slow = await asyncio.gather(*(_slow(port) for _ in range(_CLIENTS)))
        lines = [line for _, line in slow]
        assert {*lines} == {b"", b"HTTP/1.1 503 Service Unavailable\r\n"}
        # All of them together are larger than the budget's part; a small request is answered meanwhile.
        assert lines.count(b"") * _BODY_BYTES <= _BUDGET_BYTES // 4
        assert await _ask(port) == b"HTTP/1.1 200 OK\r\n"
        for writer, _ in slow:
            writer.close()
        assert await _ask(port) == b"HTTP/1.1 200 OK\r\n"

    with served(folder / "chat", "--budget", _BUDGET_BYTES) as (address, process):
        asyncio.run(asyncio.wait_for(crowd(int(address.rpartition(":")[2])), _PATIENCE_S))
        assert _peak_bytes(process.pid) <= _BUDGET_BYTES
