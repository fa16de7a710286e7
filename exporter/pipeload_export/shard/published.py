"""What the files beside a graph say about the sizes of its inputs: `config.json` and `preprocessor_config.json`.

Their values may be anything. What is no size is left out: only those who need it must complain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Published", "read_published"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Sizes that a model's publisher names.

    Attributes:
        images: heights and widths, first the one that the processor makes.
        channels: of an image; None where no file says it.
        named: numbers of `config.json` by their keys: graphs have some of these for the width of an input.
    """

    images: tuple[tuple[int, int], ...] = ()
    channels: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)


def read_published(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Published:
    """The sizes in the contents of `config.json` and `preprocessor_config.json`; either may be empty."""
    vision = config.get("vision_config")
    configs = [config, *([vision] if isinstance(vision, Mapping) else [])]
    named = [processor.get("crop_size") if processor.get("do_center_crop", True) else None, processor.get("size")]
    found = [_extents(value) for value in (*named, *(one.get("image_size") for one in configs))]
    # A crop is what the model gets; the size before it is only on the way.
    if found[0]:
        found[1] = None
    channels = [one.get("num_channels") for one in configs]
    return Published(
        images=tuple(dict.fromkeys(extents for extents in found if extents)),
        channels=next((value for value in channels if _is_size(value)), None),
        named={str(name): value for name, value in config.items() if _is_size(value)},
    )


def _extents(value: Any) -> tuple[int, int] | None:
    """Height and width from a number, a list, or an object as processors have it."""
    if isinstance(value, Mapping):
        shortest = value.get("shortest_edge")
        value = [value.get("height", shortest), value.get("width", shortest)]
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    pair = pair * 2 if len(pair) == 1 else pair
    return (pair[-2], pair[-1]) if len(pair) >= 2 and all(map(_is_size, pair[-2:])) else None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
