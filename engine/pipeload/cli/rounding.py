"""The options of `export` and `convert` about rounding."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Asymmetric", "Keep", "MaxError", "Mixed"]

Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Give each block of rounded weights a zero of its own.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LEVEL:SHARD,SHARD",
        help="Shards that stay wider: fp32 is not rounded; with int4 also int8. `head` is all slices of a head. May be "
        "repeated.",
    ),
]
Mixed = Annotated[
    str | None,
    typer.Option(
        metavar="ERROR",
        help="Keep the shards wider that rounding hurts most, until no output changes by more than this part of its "
        "range, such as 0.5%.",
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(min=0, help="Fail where rounding changes an output by more than this part of its range."),
]
