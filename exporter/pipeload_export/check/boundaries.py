"""The lengths at which a model may begin to compute something else, from its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["boundaries"]

_LENGTHS = re.compile(
    r"position|window|chunk|block_size|bucket|distance|max_seq_len|seq_length|n_ctx|local_attn|attention_span"
)
"""Keys of numbers of tokens. One too many costs a comparison, one too few a wrong answer."""


def boundaries(config: Mapping[str, Any]) -> dict[int, str]:
    """Number of tokens -> the key of the config that it stands for; the smallest first.

    Args:
        config: the content of `config.json`.
    """
    found: dict[int, str] = {}
    for name, value in _numbers(config, ""):
        if _LENGTHS.search(name) and value > 1:
            found.setdefault(value, name)
    block, random = config.get("block_size"), config.get("num_random_blocks")
    if isinstance(block, int) and isinstance(random, int):
        # BigBird looks at everything up to here, and at some blocks in longer texts.
        found.setdefault((5 + 2 * random) * block, "(5 + 2 num_random_blocks) block_size")
    return dict(sorted(found.items()))


def _numbers(value: object, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
