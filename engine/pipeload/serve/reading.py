"""From the bytes of a request to its body, within limits that are checked before anything is made of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from pipeload.machine.sizes import format_bytes
from pipeload.serve.errors import ApiError
from pipeload.serve.intake import Held
from pipeload.serve.settings import LIMITS

__all__ = ["decoded_bytes", "read", "refuse"]

Body = TypeVar("Body", bound=msgspec.Struct)

_VALUE_BYTES = 100
"""Of an empty list or object, a short text or a number, with its place in a list or object."""
_NEITHER = bytes({*range(256)} - {*b'"[]{}'})
_STEPS = np.array([(one in b"[{") - (one in b"]}") for one in range(256)], np.int8)
"""How much deeper each byte leads."""


async def read(request: Request, kind: type[Body]) -> Body:
    """The body of a request.

    Raises:
        ApiError: it is no JSON, too large, too slow, too deep, or no such body, or there is no memory for it now.
        ClientDisconnect: the client went away.
    """
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named != "application/json":
        # A page of a stranger can send other types to this server without asking it first.
        raise ApiError(415, f"The content type is '{named:.80}'; send application/json.")
    held: Held = request.scope["state"]["held"]
    data = await _bytes_of(request, held)
    _check_depth(data)
    await held.grow(len(data) + decoded_bytes(data))
    try:
        decoder: msgspec.json.Decoder[Body] = _decoder(kind)
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        field = where.rstrip("`").lstrip(".")
        raise ApiError(400, f"The request is not as it should be: {error}.", param=field or _named(message)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The request is no JSON: {error}.") from error


def refuse(body: msgspec.Struct, neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ApiError if a field asks for what the server cannot do.

    Args:
        body: the request.
        neutral: field -> values that ask for nothing.
    """
    for name, values in neutral.items():
        value = getattr(body, name)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in (None, *values)):
            known = f" or send {msgspec.json.encode(values[0]).decode()}" if values else ""
            raise ApiError(
                400,
                f"{name} is {_short(value)}, which this server does not do. Leave it out{known}.",
                code="unsupported_parameter",
                param=name,
            )


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}..."


def _named(message: str) -> str | None:
    found = re.search(r"field `(\w+)`", message)
    return found[1] if found else None


@cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decoded_bytes(data: bytearray) -> int:
    """The most memory that the objects of some JSON take.

    Args:
        data: the JSON.
    """
    # One character may make all others of its text four bytes wide; and a text with escapes is made from a copy.
    text_bytes = len(data) if data.isascii() and b"\\" not in data else 7 * len(data)
    return text_bytes + _VALUE_BYTES * sum(map(data.count, (b",", b":", b"[", b"{")))


async def _bytes_of(request: Request, held: Held) -> bytearray:
    most = LIMITS.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(LIMITS.body_s):
            await held.grow(int(declared) if declared.isdecimal() else 0)
            async for piece in request.stream():
                size = len(data) + len(piece)
                if size > most:
                    raise _too_large(most)
                if size > held.nbytes:
                    await held.grow(min(most, 2 * size))
                data += piece
    except TimeoutError as error:
        come = format_bytes(len(data))
        raise ApiError(
            408,
            f"After {LIMITS.body_s:.0f} s only {come} of the request had come. Send it faster, or less.",
            code="request_timeout",
        ) from error
    return data


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The request has more than {format_bytes(most)}. Send less at once.", code="too_large")


def _check_depth(data: bytearray) -> None:
    """Refuse what is nested too deep, in time and memory that grow with the length alone, whatever the bytes are."""
    if data.count(b"[") + data.count(b"{") <= LIMITS.json_depth:
        return
    # Without what a backslash stands before, each quote begins or ends a text.
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NEITHER)
    marks = np.frombuffer(plain, np.uint8)
    steps = _STEPS[marks]
    steps[np.cumsum(marks == ord('"'), dtype=np.uint8) & 1 == 1] = 0
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > LIMITS.json_depth:
        raise ApiError(400, f"The request has lists and objects deeper than {LIMITS.json_depth}.", code="too_deep")
