"""A checkpoint folder as the installed transformers reads it.

transformers 5 writes other keys than transformers 4 reads. The child process works on a *view*: a folder of links to
the checkpoint's files, in which config.json and tokenizer_config.json are written in the older form.

```
 5   rope_parameters: {rope_theta, rope_type, ...}         4   rope_theta, rope_scaling: {rope_type, ...}
     rope_parameters: {full_attention: {...}, ...}             and rope_local_base_freq or local_rope_theta
     tokenizer_class: TokenizersBackend                        PreTrainedTokenizerFast
     extra_special_tokens: [...]                               additional_special_tokens: [...]
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeload_export.extra import has_optimum
from pipeload_export.source.config_keys import knows, nested_kinds, parameters, unknown_keys
from pipeload_export.source.folder import read_json
from pipeload_export.source.refused import Refused

__all__ = ["older_config", "older_tokenizer_config", "view_of"]

_ROPE = "rope_parameters"
_THETAS = ("rotary_emb_base", "global_rope_theta", "rope_theta")
_LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
_PARTS = ("rotary_pct", "partial_rotary_factor")
_MOST_KEYS = 6


def view_of(folder: Path, view: Path) -> Path:
    """Make the view of a checkpoint folder, unless it is there. Returns its path.

    Raises:
        Refused: config.json has keys that may change an answer and that the installed transformers does not read.
    """
    if view.exists():
        return view
    config = read_json(folder / "config.json")
    written = {"config.json": _checked(config)}
    if tokenizer := read_json(folder / "tokenizer_config.json"):
        written["tokenizer_config.json"] = older_tokenizer_config(
            tokenizer, has_json=(folder / "tokenizer.json").is_file()
        )
    view.mkdir()
    for path in folder.iterdir():
        if path.name not in written:
            (view / path.name).symlink_to(path.resolve())
    for name, value in written.items():
        (view / name).write_text(json.dumps(value))
    return view


def older_config(config: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The content of config.json with the keys that the config class `kind` reads; what it cannot say stays."""
    older = dict(config)
    for key, nested in nested_kinds(kind).items():
        if isinstance(older.get(key), dict):
            older[key] = older_config(older[key], nested)
    rope = older.get(_ROPE)
    if not isinstance(rope, dict) or knows(kind, _ROPE):
        return older
    if (flat := _without_layer_types(rope, kind, older)) is not None:
        del older[_ROPE]
        _set_rope(older, flat, kind)
    return older


def older_tokenizer_config(config: Mapping[str, Any], *, has_json: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json with the keys and classes that the installed transformers reads."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    older = dict(config)
    name = older.get("tokenizer_class")
    unknown = isinstance(name, str) and not any(map(tokenizer_class_from_name, (name, f"{name}Fast")))
    if unknown and has_json and "auto_map" not in older:
        # Such a class is no more than its tokenizer.json.
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = older.get("extra_special_tokens")
    if isinstance(extra, list) and has_optimum():
        del older["extra_special_tokens"]
        older["additional_special_tokens"] = [*older.get("additional_special_tokens", ()), *extra]
    return older


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = config.get("model_type")
    if name not in CONFIG_MAPPING or "AutoConfig" in (config.get("auto_map") or {}):
        return config
    kind = CONFIG_MAPPING[name]
    older = older_config(config, kind)
    if unknown := unknown_keys(older, kind):
        shown = ", ".join(f"{key} = {json.dumps(_at(older, key))[:80]}" for key in unknown[:_MOST_KEYS])
        raise Refused(
            f"its config.json has {len(unknown)} key{'s' * (len(unknown) > 1)} that {kind.__name__} of transformers "
            f"{transformers.__version__} does not read: {shown}. A model that needs this would give wrong answers. "
            "Install a transformers that reads it, or take it out of config.json if it changes nothing."
        )
    return older


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _without_layer_types(rope: Mapping[str, Any], kind: type, older: dict[str, Any]) -> Mapping[str, Any] | None:
    """The parameters of full attention; those of other layers go into `older`. None if `kind` has no place for them."""
    if not all(isinstance(value, dict) for value in rope.values()):
        return rope
    full, local = rope.get("full_attention"), rope.get("sliding_attention")
    if full is None or rope.keys() - {"full_attention", "sliding_attention"}:
        return None
    if local is None or local == full:
        return dict(full)
    key = next((key for key in _LOCAL_THETAS if key in parameters(kind)), None)
    if key is None or local.keys() - {"rope_theta", "rope_type"} or local.get("rope_type", "default") != "default":
        return None
    older[key] = local["rope_theta"]
    return dict(full)


def _set_rope(older: dict[str, Any], rope: Mapping[str, Any], kind: type) -> None:
    rest = dict(rope)
    known = parameters(kind)
    if (theta := rest.pop("rope_theta", None)) is not None:
        older[next((key for key in _THETAS if key in known), "rope_theta")] = theta
    if (part := rest.pop("partial_rotary_factor", None)) is not None:
        older[next((key for key in _PARTS if key in known), _PARTS[-1])] = part
    if rest.get("rope_type", "default") == "default":
        return
    if rest["rope_type"] == "longrope" and "original_max_position_embeddings" in rest:
        older["original_max_position_embeddings"] = rest.pop("original_max_position_embeddings")
    if hasattr(kind, "_rope_scaling_adjustment"):  # Phi-3, which takes three keys and no other
        rest = {"type": rest["rope_type"], **{key: rest[key] for key in ("short_factor", "long_factor") if key in rest}}
    older["rope_scaling"] = rest
