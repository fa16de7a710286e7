"""A value of a field of a request, and what the server does with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.clients.answers import Answer

__all__ = ["Row", "cannot", "nothing", "refuses", "works"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A value of a field.

    Attributes:
        base: the request without the field, as far as it goes without.
        route: of the request.
        name: of the field.
        value: of the field, as JSON.
        effect: what the server does with it, in words; where it is refused, why.
        holds: whether this is true of an answer; gets the answer to `base`, too. None where the value is refused.
        words: a part of the message of a refusal.
        param: the field that a refusal names.
        status: of the answer.
        beside: other fields, without which the value would have no effect.
    """

    base: Mapping[str, Any]
    route: str
    name: str
    value: Any
    effect: str
    holds: Callable[[Answer, Answer], object] | None = None
    words: str = ""
    param: str = ""
    status: int = 200
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The request."""
        return {**self.base, **self.beside, self.name: self.value}

    @property
    def shown(self) -> str:
        """The value, short."""
        text = json.dumps(self.value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:57]}..."


def works(
    route: str,
    base: Mapping[str, Any],
    name: str,
    value: Any,
    effect: str,
    holds: Callable[[Answer, Answer], object],
    **beside: Any,
) -> Row:
    """A value that is taken."""
    return Row(base=base, route=route, name=name, value=value, effect=effect, holds=holds, beside=beside)


def nothing(route: str, base: Mapping[str, Any], effect: str = "no effect", **fields: Any) -> list[Row]:
    """Values that are taken and change nothing."""
    return [works(route, base, name, value, effect, lambda a, b: a.same(b)) for name, value in fields.items()]


def refuses(
    route: str,
    base: Mapping[str, Any],
    name: str,
    value: Any,
    effect: str,
    words: str,
    param: str | None = None,
    status: int = 400,
    **beside: Any,
) -> Row:
    """A value that is refused, with words of the message."""
    named = name if param is None else param
    return Row(
        base=base,
        route=route,
        name=name,
        value=value,
        effect=effect,
        words=words,
        param=named,
        status=status,
        beside=beside,
    )


def cannot(route: str, base: Mapping[str, Any], effect: str, **fields: Any) -> list[Row]:
    """Values that ask for what the server does not do."""
    return [refuses(route, base, name, value, effect, f"{name} is ") for name, value in fields.items()]
