"""One tiny model for each family: every model type that optimum exports for a task that the engine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.families.architectures import DECODERS, ENCODERS, OTHER_HEADS, SERIES, SOUNDS, VISUAL

Inputs = Literal["text", "image", "sound", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, with the head of one task.

    Attributes:
        model_type: what config.json calls it; the config class is the one of that name in transformers.
        task: one of the tasks that pipeload exports.
        inputs: which cases it is tried with.
        options: arguments of the config class, beside those of `SMALL`.
        quick: CI tries it, too, among the slow tests.
        attention: transformers' implementation of attention that is the reference.
    """

    model_type: str
    task: str
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    attention: str = "eager"


_QUICK = ("albert", "deberta-v2", "gpt_neox", "llama/text-classification", "mistral/sliding", "vit")
_SDPA = ("falcon/alibi",)
"""transformers 4.57 adds the alibi of Falcon twice where attention is eager: in the mask, and to the scores."""

UNTRIED: Mapping[str, str] = {
    "colpali": "AutoModel of transformers has no class for it",
    "internlm2": "it is no family of transformers: its checkpoints bring Python code of their own",
    "siglip-text": "no config of transformers has this model type",
    "siglip-text-with-projection": "no config of transformers has this model type",
    "trocr": "AutoModel of transformers has no class for it",
}
"""Model types that optimum exports for a task of the engine, and that no checkpoint can be made of."""


def _families() -> dict[str, Family]:
    found: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    found |= {name: ("text", *entry) for name, entry in (ENCODERS | OTHER_HEADS).items()}
    found |= {name: ("text", "text-generation", options) for name, options in DECODERS.items()}
    found |= {name: ("image", *entry) for name, entry in VISUAL.items()}
    found |= {name: ("sound", "feature-extraction", options) for name, options in SOUNDS.items()}
    found |= {name: ("other", "feature-extraction", options) for name, options in SERIES.items()}
    return {
        name: Family(
            model_type=name.partition("/")[0],
            task=task,
            inputs=inputs,
            options=options,
            quick=name in _QUICK,
            attention="sdpa" if name in _SDPA else "eager",
        )
        for name, (inputs, task, options) in sorted(found.items())
    }


FAMILIES: Mapping[str, Family] = _families()
"""Name -> family; what follows a slash in a name is a variant or another head."""
