"""The settings of a server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["LIMITS", "Limits", "Settings", "is_loopback", "most_connections"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest and the slowest requests that are taken.

    Attributes:
        body_bytes: of a request.
        bodies_bytes: of all bodies together, as they came and as objects, without taking memory from weights.
        headers: of a request.
        head_s: seconds in which a connection must have brought all headers of a request.
        body_s: seconds after these in which all of the body must have come.
        unread_s: seconds that an answer may wait for its client to take more of it.
        json_depth: of lists and objects within one another.
        inputs: texts, documents or images of a request.
        messages: of a conversation.
        text_characters: of a text; while it is read, all other calls wait.
        prompt_tokens: of a prompt; a model's own positions may allow fewer.
        copies: answers to one prompt.
        stops: stop strings.
        stop_characters: of a stop string.
        image_bytes: of an image, as a file.
        image_pixels: of an image; they are counted before it is decoded.
    """

    body_bytes: int = 16 << 20
    bodies_bytes: int = 2_000_000
    headers: int = 100
    head_s: float = 30.0
    body_s: float = 60.0
    unread_s: float = 60.0
    json_depth: int = 64
    inputs: int = 2048
    messages: int = 8192
    text_characters: int = 1 << 20
    prompt_tokens: int = 131_072
    copies: int = 16
    stops: int = 16
    stop_characters: int = 256
    image_bytes: int = 12 << 20
    image_pixels: int = 16_000_000


LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server runs.

    Attributes:
        directories: name -> sharded model directory; none for a server of a cluster's models.
        aliases: other name -> one of these names.
        budget: the memory budget of the process, as `pipeload.load` takes it.
        host: address to listen on.
        port: of TCP; 0 takes a free one.
        keys: a request must name one of them; none asks for no key.
        max_waiting: calls that are served or wait, all models together; the next one is refused.
        idle_s: a model is closed after this many seconds without a call; None keeps it open.
        drain_s: seconds that calls have to end after SIGTERM.
        prefix_cache_bytes: the most that KV caches of each model's ended texts may take; None for a part of the budget.
        cors_origins: web origins whose pages may call; `*` for any.
        log_format: the form of the log on stderr; None writes none.
        cluster: the address of the cluster whose models are served; None for models of this machine.
        certificates: for this address, as `pipeload.connect` takes them.
        names: of the cluster's models; none for all that its nodes have at the start.
    """

    directories: Mapping[str, Path]
    aliases: Mapping[str, str]
    budget: int | str = "auto"
    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[bytes, ...] = ()
    max_waiting: int = 32
    idle_s: float | None = None
    drain_s: float = 20.0
    prefix_cache_bytes: int | None = None
    cors_origins: tuple[str, ...] = ()
    log_format: Literal["text", "json"] | None = None
    cluster: str | None = None
    certificates: Path | None = None
    names: tuple[str, ...] = ()


def most_connections(calls: int) -> int:
    """The connections of a server with this many places. Clients keep some open between two calls."""
    return calls + 32


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
