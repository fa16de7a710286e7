"""HTTP that two readers take differently, and connections that take what others need.

The attacker is a client, or stands behind a proxy that others share. He wants his bytes taken for another client's
request, an answer split in two, a file of the machine, or a server that answers no other client.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

from tests.attacks.attack import HELD, SucceededError, attack, run_module
from tests.attacks.victims import Server, rest_of, statuses

from pipeload.serve import connections, intake
from pipeload.serve import server as server_module
from pipeload.serve.settings import LIMITS

_SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
_POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@attack
def requests_with_two_lengths(_folder: Path) -> str:
    """Content-Length and Transfer-Encoding together, two lengths, lists of them: another request hides behind."""
    with Server() as server:
        for head in (
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: chunked\r\nContent-Length: 90\r\n",
            b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n",
            b"Content-Length: 5\r\nContent-Length: 6\r\n",
            b"Content-Length: 5, 6\r\n",
            b"Content-Length: +5\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: 0x5\r\n",
            b"Content-Length: 5 5\r\n",
            b"Content-Length: 5\r\n 5\r\n",
            b"Content-Length:\xb2\r\n",
        ):
            told = server.send(_POST + head + b"\r\n0\r\n\r\n" + _SMUGGLED)
            if statuses(told) != [400] or b"connection: close" not in told.lower():
                raise SucceededError(f"{head!r}: {told!r}")
        return f"refused: {told.partition(b'message')[2][3:100].decode()}"


@attack
def codings_that_are_none(_folder: Path) -> str:
    """Transfer codings that others may take for `chunked`, or not: with spaces, in lists, misspelt."""
    with Server() as server:
        for head in (
            b"Transfer-Encoding: xchunked\r\n",
            b"Transfer-Encoding : chunked\r\n",
            b"Transfer-Encoding: chunked, identity\r\n",
            b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: \x0bchunked\r\n",
            b"Transfer-Encoding: gzip\r\n",
            b"Transfer\x00-Encoding: chunked\r\n",
        ):
            told = statuses(server.send(_POST + head + b"\r\n0\r\n\r\n" + _SMUGGLED))
            if len(told) != 1 or told[0] not in (400, 501):
                raise SucceededError(f"{head!r}: {told}")
    return HELD


@attack
def chunks_of_odd_sizes(_folder: Path) -> str:
    """Chunks whose sizes are negative, in another base, enormous, or followed by more than a line's end."""
    with Server() as server:
        for size in (b"-1", b"0x5", b"5 5", b"f" * 40, b"", b"5\n", b"g", b"1\r\nab"):
            told = statuses(server.send(_POST + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + _SMUGGLED * 2))
            if told != [400]:
                raise SucceededError(f"{size!r}: {told}")
    return HELD


@attack
def heads_that_are_none(_folder: Path) -> str:
    """No version, another one, two hosts, no host, control characters, and floods of headers and of one header."""
    line = b"GET /v1/models HTTP/1.1\r\n"
    with Server() as server:
        for head in (
            b"GET /v1/models\r\n\r\n",
            b"GET /v1/models HTTP/9.9\r\nConnection: close\r\n\r\n",
            b"GET  /v1/models HTTP/1.1\r\n\r\n",
            line + b"\r\n",
            line + b"Host: localhost\r\nHost: evil\r\n\r\n",
            line + b"Host: localhost\r\nX: a\x00b\r\n\r\n",
            line + b"Host: localhost\r\nX: a\rb\r\n\r\n",
            line + b"Host: localhost\r\n: b\r\n\r\n",
            line + b"Host: localhost\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
            line + b"Host: localhost\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
            b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            told = statuses(server.send(head))
            # A flood may meet a connection that is closed already, and one head may be read as two.
            if not set(told) <= {400, 403} or (not told and len(head) < 1000):
                raise SucceededError(f"{head[:60]!r}: {told}")
    return HELD


@attack
def targets_elsewhere(_folder: Path) -> str:
    """Absolute targets, CONNECT, an upgrade to a websocket, and paths that lead out of the page's folder."""
    with Server() as server:
        for target in (
            "http://evil.example/v1/models",
            "//evil.example/v1/models",
            "/page/../../settings.py",
            "/page/..%2f..%2fsettings.py",
            "/page/%2e%2e/%2e%2e/settings.py",
            "/page/....//settings.py",
            "/page//etc/passwd",
            "/page/index.html%00.js",
            "/page/INDEX.HTML",
            "/v1/models/../../etc/passwd",
            "/v1/models/x%0d%0aSet-Cookie:%20a=b",
            "/%0d%0aSet-Cookie:%20a=b",
        ):
            status, head, body = server.ask("GET", target)
            if status != 404 or b"Set-Cookie" in head or b"Limits" in body or b"root:" in body:
                raise SucceededError(f"{target}: {status} {head!r}")
        if server.ask("CONNECT", "evil.example:443")[0] < 400:
            raise SucceededError("it is a proxy")
        upgraded = {"Upgrade": "websocket", "Sec_WebSocket_Key": "a" * 24, "Sec_WebSocket_Version": "13"}
        if server.ask("GET", "/v1/models", **(upgraded | {"Connection": "Upgrade, close"}))[0] != 200:
            raise SucceededError("an upgrade changes the answer")
    return HELD


@attack
def requests_in_one_go(_folder: Path) -> str:
    """A hundred requests in one packet: each gets its answer, in order."""
    with Server() as server:
        one = b"GET /page/%d HTTP/1.1\r\nHost: localhost\r\n"
        told = server.send(b"".join(one % i + b"\r\n" for i in range(100)) + one % 100 + b"Connection: close\r\n\r\n")
        if [f"/page/{i} is".encode() in told for i in range(101)] != [True] * 101 or len(statuses(told)) != 101:
            raise SucceededError(f"{len(statuses(told))} answers")
    return HELD


@attack
def senders_that_never_end(_folder: Path) -> str:
    """A head and a body that come byte by byte, or not at all, hold a connection until the end of their time."""
    quick = replace(LIMITS, head_s=0.2, body_s=0.2)
    with mock.patch.object(connections, "LIMITS", quick), mock.patch("pipeload.serve.reading.LIMITS", quick):
        with Server() as server:
            for begun, told in ((b"", []), (b"GET / HT", []), (_POST + b"Content-Length: 9\r\n\r\n{", [408])):
                if statuses(server.send(begun)) != told:
                    raise SucceededError(f"{begun!r} was answered")
    return HELD


@attack
def a_thousand_connections(_folder: Path) -> str:
    """More connections than the server takes: those that have asked nothing for the longest time give way."""
    with mock.patch.object(server_module, "most_connections", return_value=8), Server() as server:
        with ExitStack() as stack:
            for _ in range(8):
                idle = stack.enter_context(server.connect())
                idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                idle.recv(1)
            late = stack.enter_context(server.connect())
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            told, most = statuses(rest_of(late)), len(server.running.server_state.connections)
            if told != [200] or most > 8:
                raise SucceededError(f"{told}, {most} connections")
    return HELD


@attack
def bodies_of_many_clients(_folder: Path) -> str:
    """Clients that hold large bodies back until all have come: together they have no more than a fixed size."""
    mib = 1 << 20
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(intake, "LIMITS", replace(LIMITS, bodies_bytes=3 * mib)))
        stack.enter_context(mock.patch.object(intake, "_PART", 1 << 60))
        stack.enter_context(mock.patch.object(intake, "_UNKNOWN_BYTES", 0))
        server = stack.enter_context(Server())
        head = _POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (2 * mib)
        slow = stack.enter_context(server.connect())
        slow.sendall(head + b" " * (2 * mib - 1))
        # Whichever of the two finds no room is refused.
        told = server.send(head + b" " * (2 * mib - 1) + b"}")
        slow.sendall(b"}")
        first = slow.recv(1 << 16)
        if 503 not in (*statuses(told), *statuses(first)):
            raise SucceededError(f"{statuses(told)} {statuses(first)}")
        small = server.ask("POST", "/tokenize", json.dumps({"prompt": "a"}).encode())
    if small[0] != 400 or b"names no model" not in small[2]:
        raise SucceededError("a small request is refused as well")
    return "refused: There is no memory for this request now."


if __name__ == "__main__":
    run_module(Path(__file__).stem)
