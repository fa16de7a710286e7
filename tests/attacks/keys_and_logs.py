"""Keys of a server, and lines of its log.

The attacker is a client without a key, or one who can read the log, or who is read of there. He wants the key, answers
without it, or lines in the log that the server has not written.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from unittest import mock

from tests.attacks.attack import HELD, SucceededError, attack, run_module
from tests.attacks.victims import Server

from pipeload.errors import RunError
from pipeload.serve import door
from pipeload.serve.errors import api_error
from pipeload.serve.routes.page import PATHS

_KEY = b"correct-horse-battery-staple"
_OPEN = {"/health", "/ready", *PATHS}


@attack
def routes_without_a_key(_folder: Path) -> str:
    """Every route without a key, with a part of one, a longer one, another scheme, and a key in the address."""
    with Server(keys=(_KEY,)) as server:
        application = server.running._application
        paths = [route.path for route in application.routes if route.path not in _OPEN]
        key = _KEY.decode()
        for path in (*paths, "/unknown", "/health/", "//health", "/HEALTH", "/page/../metrics"):
            where = path.replace("{model:path}", "x").replace("{file}", "../x")
            for given in ("", "Bearer", "Bearer ", f"Bearer {key[:-1]}", f"Bearer {key}x", f"Basic {key}", key,
                          f"Bearer {key.upper()}", "Bearer \xe9"):  # fmt: skip
                headers = {"Authorization": given} if given else {}
                for method in ("GET", "POST", "HEAD"):
                    status, _, _ = server.ask(method, f"{where}?api_key={key}", b"{}", **headers)
                    if status != 401:
                        raise SucceededError(f"{method} {where} with '{given}': {status}")
        if server.ask("GET", "/v1/models", Authorization=f"bearer {key}")[0] != 200:
            raise SucceededError("the key itself is refused")
        if key in server.log:
            raise SucceededError("the key is in the log")
        return f"refused: {server.ask('GET', '/v1/models')[2].decode()}"


@attack
def keys_by_the_time_of_an_answer(_folder: Path) -> str:
    """Keys are compared in a time that tells nothing: all of them, each by a comparison that ends at no difference."""
    compared, compare = [], hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(one, other)

    with mock.patch.object(door.hmac, "compare_digest", noting), Server(keys=(_KEY, b"second", b"third")) as server:
        for given in (_KEY.decode(), "second", "wrong"):
            server.ask("GET", "/v1/models", Authorization=f"Bearer {given}")
    if compared != [_KEY, b"second", b"third"] * 3:
        raise SucceededError(f"compared only {compared}")
    return HELD


@attack
def lines_that_the_server_has_not_written(_folder: Path) -> str:
    """Newlines, orders of a terminal and turned text in paths, names of models, headers, and messages of failures."""
    evil = "x\n2026-01-01 INFO forged\x1b[2J\x1b]0;title\x07\u202egnp.exe\x85\u2028"
    with Server() as server:
        server.ask("GET", "/v1/models/x%0aforged%1b%5b2J", User_Agent="\x1b[2J")
        server.ask("POST", "/tokenize", b'{"model": "x\\nforged\\u001b[2J", "prompt": "a"}')
        server.ask("FORGED", "/%1b")
        api_error(RunError(evil))
        api_error(ValueError(evil))
        lines = server.log.splitlines()
    odd = [line for line in lines if line.startswith(("forged", "2026-01-01 INFO forged"))]
    if odd or not "".join(lines).isprintable():
        raise SucceededError(server.log)
    return HELD


if __name__ == "__main__":
    run_module(Path(__file__).stem)
