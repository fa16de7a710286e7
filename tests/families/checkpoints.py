"""A checkpoint folder of a family, with seeded weights, as transformers itself saves it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from tests.families.architectures import IMAGE, SMALL, VOCABULARY
from tests.families.catalog import Family

from pipeload_export.source.task import TASKS

_IDS = {"pad": 0, "bos": 1, "cls": 1, "decoder_start": 2, "eos": 2, "sep": 2, "forced_eos": 2, "unk": 3, "mask": 4}
"""Special tokens, for a config whose own lie outside of the small vocabulary."""
_NOISE = 0.1
"""Biases begin at 0 and norms at 1; noise makes their place in a graph visible."""


def make_config(family: Family) -> Any:
    """The small config of transformers."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = CONFIG_MAPPING[family.model_type]
    parameters = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {}
    for name, value in SMALL.items():
        known = kind.attribute_map.get(name, name)
        if known in parameters:
            options[known] = value
    options |= {kind.attribute_map.get(name, name): value for name, value in family.options.items()}
    parts = kind.sub_configs if isinstance(kind.sub_configs, dict) else {}  # some classes make theirs anew each time
    for name, part in parts.items():
        if name in options and part is not AutoConfig:
            options[name] = {key: value for key, value in options[name].items() if _reads(part, key)}
    if "classification" in family.task and "num_labels" not in parameters:
        options["num_labels"] = 3
    config = kind(**options)
    for name, number in _IDS.items():
        value = getattr(config, f"{name}_token_id", None)
        # A decoder needs a token for padding; other models get one where the class has one.
        wanted = family.task == "text-generation" or name == "pad"
        if (isinstance(value, int) and value >= VOCABULARY) or (value is None and name == "pad" and wanted):
            setattr(config, f"{name}_token_id", number)
    return config


def _reads(kind: Any, key: str) -> bool:
    return key.endswith("_token_id") or kind.attribute_map.get(key, key) in inspect.signature(kind.__init__).parameters


def write_checkpoint(family: Family, folder: Path) -> None:
    """Make the model with the head of the family's task, and save it."""
    import torch
    import transformers

    config = make_config(family)
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[family.task]).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(_NOISE * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family.inputs == "image":
        height, width = image_size(config)
        (folder / "preprocessor_config.json").write_text(
            json.dumps(
                {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True}
                | {"size": {"height": height, "width": width}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            )
        )


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a model was made for."""
    size = getattr(getattr(config, "vision_config", config), "image_size", IMAGE)
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
