"""Texts and token ids in the forms in which clients send them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS

__all__ = ["check_count", "listed"]


def listed(given: str | Sequence[str | int | list[int]], name: str) -> list[str | list[int]]:
    """A text, its token ids, or a list of either, as a list.

    Args:
        given: as the client sent it.
        name: of its field.

    Raises:
        ApiError: there is none, there are too many, or numbers stand beside texts.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, f"{name} is an empty list. Send at least one text.", param=name)
    if all(isinstance(one, int) for one in given):
        return [[*given]]  # type: ignore[list-item] # all of them are numbers
    check_count(given, name)
    if any(isinstance(one, int) for one in given):
        raise ApiError(
            400, f"{name} has numbers beside texts. Send one text's token ids, or a list of lists.", param=name
        )
    return [*given]  # type: ignore[list-item] # none of them is a number


def check_count(given: Sequence[object], name: str) -> None:
    """Raise ApiError if a request has no input, or too many.

    Args:
        given: the inputs.
        name: of their field.
    """
    if not given:
        raise ApiError(400, f"{name} is an empty list. Send at least one.", param=name)
    if len(given) > LIMITS.inputs:
        raise ApiError(400, f"{name} has {len(given)} entries; this server takes {LIMITS.inputs} at once.", param=name)
