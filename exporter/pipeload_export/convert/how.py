"""How weights are to be rounded, as a caller says it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from pipeload.errors import ConfigError
from pipeload.format.manifest import SmallWeights

__all__ = ["BlockSize", "How", "RoundedWeights", "how_to_round", "limit_of"]

RoundedWeights = Literal["bf16", "fp16", "int8", "int4"]
"""Weights rounded to 16 bits, or those of products and tables to 8 or 4 bits with a scale for each block of them."""

BlockSize = Literal["16", "32", "64", "128", "256"]
"""Weights of 8 or 4 bits that have one scale."""

_Level: TypeAlias = Literal["fp32", "int8"]
_TYPES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
_BITS: dict[str, int] = {"int8": 8, "int4": 4}
_FINE_BITS = 8
"""Of tables, the head that is tied to one, and products that narrow: 4 bits hurt there most."""
_NO_ERROR = (
    "An error is only measured where weights are rounded (--weights bf16, fp16, int8 or int4), or those of a "
    "GGUF file, and the result is verified: leave --{option} out, or --no-verify."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How weights are to be rounded.

    Attributes:
        small: the record for the manifest, without what will be measured.
        kept: shard -> "fp32" or "int8", which it stays.
        mixed: keep the worst shards wider until all outputs are as near as this, in parts of their range.
        max_error: fail where an output is further off.
    """

    small: SmallWeights
    kept: dict[str, str] = field(default_factory=dict)
    mixed: float | None = None
    max_error: float | None = None

    @property
    def levels(self) -> tuple[str, ...]:
        """What shards can be kept at, the narrowest first."""
        return ("int8", "fp32") if self.small.bits < _FINE_BITS else ("fp32",)


def how_to_round(
    weights: str,
    *,
    block_size: int,
    asymmetric: bool,
    keep: Iterable[str],
    mixed: str | float | None,
    max_error: float | None,
    verify: bool,
) -> How | None:
    """Check the arguments of `export` and `convert` about rounding; None where nothing is rounded.

    Raises:
        ConfigError: one cannot be used.
    """
    sizes = tuple(map(int, get_args(BlockSize)))
    if block_size not in sizes:
        raise ConfigError(f"The size of blocks cannot be {block_size!r}; take one of {', '.join(map(str, sizes))}.")
    limit, given = limit_of(mixed), tuple([keep] if isinstance(keep, str) else keep)
    if mixed is not None and (not verify or weights not in (*_TYPES, *_BITS)):
        raise ConfigError(_NO_ERROR.format(option="mixed"))
    if max_error is not None and (not verify or weights == "fp32"):
        raise ConfigError(_NO_ERROR.format(option="max-error"))
    if weights in _TYPES:
        small = SmallWeights(dtype=_TYPES[weights], bits=16, fine_bits=16, block_size=1, symmetric=True)
    elif weights in _BITS:
        symmetric = not asymmetric
        small = SmallWeights(bits=_BITS[weights], fine_bits=_FINE_BITS, block_size=block_size, symmetric=symmetric)
    elif given:
        raise ConfigError(
            f"--keep {given[0]} has no meaning with weights that are not rounded. Pass --weights bf16, fp16, int8 or "
            "int4 too, or leave it out."
        )
    else:
        return None
    how = How(small=small, mixed=limit, max_error=max_error)
    return replace(how, kept=_kept(given, how.levels, weights))


def limit_of(mixed: str | float | None) -> float | None:
    """The limit of `--mixed`, a number or "0.5%", in parts of an output's range.

    Raises:
        ConfigError: it is none.
    """
    if mixed is None:
        return None
    number, percent = re.fullmatch(r"(.*?)\s*(%?)", str(mixed).strip()).groups()  # type: ignore[union-attr]
    try:
        limit = float(number) / (100 if percent else 1)
    except ValueError:
        limit = -1.0
    if not 0 < limit < 1:
        raise ConfigError(
            f"--mixed {mixed} is no error in parts of an output's range. Pass a number between 0 and 1, such as 0.005, "
            "or a percentage, such as 0.5%."
        )
    return limit


def _kept(keep: Iterable[str], levels: tuple[str, ...], weights: str) -> dict[str, str]:
    """Shard -> level, of texts "LEVEL:SHARD,SHARD"."""
    kept: dict[str, str] = {}
    for text in keep:
        level, _, names = text.partition(":")
        shards = [name.strip() for name in names.split(",") if name.strip()]
        if level not in levels or not shards:
            known = " or ".join(f"{level}:SHARD,SHARD" for level in reversed(levels))
            raise ConfigError(f"--keep {text} cannot be used with --weights {weights}. Pass {known}.")
        for name in shards:
            if kept.setdefault(name, level) != level:
                raise ConfigError(f"--keep names the shard '{name}' as {kept[name]} and as {level}. Pass one of them.")
    return kept
