"""Rotary positions whose frequencies depend on the length of the text, in a form that a trace can follow.

transformers chooses the frequencies by `if` in Python, and a trace keeps the branch that the sample took. Here the
graph chooses them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pipeload.format.manifest import RopeChange

__all__ = ["change_of", "follow_lengths"]


def change_of(config: Mapping[str, Any]) -> RopeChange | None:
    """Where the frequencies of a model change; None where they do not depend on the length of a text.

    Args:
        config: the content of `config.json`, as transformers writes it: version 5 has all of a rope in one place.
    """
    scaling, parameters = (
        value if isinstance(value := config.get(key), dict) else {} for key in ("rope_scaling", "rope_parameters")
    )
    rope = scaling or parameters
    kind = str(rope.get("rope_type", rope.get("type")))
    most = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings", parameters.get("original_max_position_embeddings"))
    is_dynamic = "dynamic" in kind
    tokens = most if is_dynamic else (original or most) if kind == "longrope" else None
    return RopeChange(tokens=tokens, keeps_caches=is_dynamic) if isinstance(tokens, int) else None


def follow_lengths(model: Any) -> None:
    """Give each rotary module of a model of transformers a forward pass without branches.

    Args:
        model: it is changed, for tracing only.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or not hasattr(module, "inv_freq"):
            continue
        if "dynamic" in kind:
            module.forward = _with_frequencies(module, _dynamic(module))
        elif kind == "longrope":
            module.forward = _with_frequencies(module, _long(module))


class _Instead:
    """A rotary module with other frequencies. It is left as it is: a trace would take a change for an answer."""

    def __init__(self, module: Any, inv_freq: Any) -> None:
        self._module, self.inv_freq = module, inv_freq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_frequencies(module: Any, frequencies: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    # Without the decorator that chooses the frequencies.
    plain = inspect.unwrap(type(module).forward)
    return lambda x, position_ids: plain(_Instead(module, frequencies(position_ids.max() + 1)), x, position_ids)


def _frequencies(module: Any, length: Any) -> Any:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[module.rope_type](module.config, module.inv_freq.device, seq_len=length)[0]


def _dynamic(module: Any) -> Callable[[Any], Any]:
    """The base grows with texts longer than those that the model was trained on."""
    return lambda length: _frequencies(module, length)


def _long(module: Any) -> Callable[[Any], Any]:
    """Two sets of frequencies, for short and for long texts."""
    import torch

    change = change_of(module.config.to_dict())
    assert change is not None
    most = change.tokens
    short, long = (_frequencies(module, length) for length in (most, most + 1))
    return lambda length: torch.where(length > most, long, short)
