"""Pages in the user's browser that call a server on this machine.

The attacker has a web page, which the user visits while a server without keys listens on loopback. He wants answers of
its models, or their work. What the browser itself keeps back is not tried here, only what the server must do for it:
answer no foreign name, take no request that browsers send without asking, and allow no origin that was not named.
"""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import HELD, SucceededError, attack, run_module
from tests.attacks.victims import Server

_EVIL = "http://evil.example"


@attack
def a_name_that_leads_to_loopback(_folder: Path) -> str:
    """DNS rebinding: the page's own name leads to 127.0.0.1, so the browser takes the server for the page's own."""
    with Server() as server:
        for host in (
            "evil.example",
            f"evil.example:{server.port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1.nip.io:8080",
            "[::1].evil.example",
            "[::1]evil.example:80",
            "evil.example#localhost",
            "localhost:80@evil.example",
            "localhost@evil.example",
            "localhost evil.example",
            "evil.example:80:127.0.0.1",
            "0.0.0.0",
            "192.168.1.2",
            "",
            "localhost.",
            "\uff11\uff12\uff17.0.0.1",
        ):
            for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/"), ("OPTIONS", "/tokenize")):
                status, _, _ = server.ask(method, path, Host=host.encode().decode("latin-1"))
                if status not in (400, 403):
                    raise SucceededError(f"{method} {path} as '{host}' was answered with {status}")
        for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "127.8.9.10:1", "[::1]:8080"):
            if server.ask("GET", "/v1/models", Host=host)[0] != 200:
                raise SucceededError(f"its own name '{host}' is refused")
        return f"refused: {server.ask('GET', '/', Host='evil.example')[2].decode()}"


@attack
def requests_that_need_no_question(_folder: Path) -> str:
    """Every POST in the forms that a browser sends to a stranger without asking: forms, plain text, no type."""
    with Server() as server:
        paths = sorted(server.running._application.work.paths)
        for path in paths:
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
                         "text/plain; application/json", "text/json"):  # fmt: skip
                status, _, _ = server.ask("POST", path, b'{"prompt": "a"}', Content_Type=kind, Origin=_EVIL)
                if status != 415:
                    raise SucceededError(f"{path} took '{kind}': {status}")
        return f"refused: {server.ask('POST', paths[0], b'{}', Content_Type='text/plain')[2].decode()}"


@attack
def origins_that_were_not_named(_folder: Path) -> str:
    """Preflights, and answers that a page could read: none allows an origin that the user has not named."""
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type, authorization"}
    for named in ((), ("http://good.example",)):
        with Server(cors_origins=named) as server:
            for origin in (
                _EVIL,
                "null",
                "http://good.example.evil.example",
                "https://good.example",
                "http://localhost",
            ):
                for method, path in (("OPTIONS", "/tokenize"), ("GET", "/v1/models"), ("GET", "/health")):
                    _, head, _ = server.ask(method, path, Origin=origin, **(asked if method == "OPTIONS" else {}))
                    if b"access-control-allow-origin" in head.lower():
                        raise SucceededError(f"{origin} may read {path}: {head!r}")
    with Server(cors_origins=("http://good.example",)) as server:
        _, head, _ = server.ask("OPTIONS", "/tokenize", Origin="http://good.example", **asked)
        if b"access-control-allow-origin: http://good.example" not in head.lower():
            raise SucceededError("the named origin is not allowed")
    return HELD


@attack
def the_page_in_a_frame(_folder: Path) -> str:
    """The server's own page in a frame of another page, where a click on one is a click on the other."""
    with Server() as server:
        _, head, _ = server.ask("GET", "/")
        if b"frame-ancestors 'none'" not in head or b"default-src 'none'" not in head:
            raise SucceededError(head.decode())
    return HELD


if __name__ == "__main__":
    run_module(Path(__file__).stem)
