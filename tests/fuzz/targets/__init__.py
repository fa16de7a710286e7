"""The readers that are tried, by name."""

from __future__ import annotations

from importlib import import_module

from tests.fuzz.target import Target

__all__ = ["NAMES", "target_of"]

_MODULES = {
    "sizes": "sizes",
    "manifest": "manifest",
    "plan": "manifest",
    "safetensors": "safetensors",
    "checkpoint": "safetensors",
    "graph": "graph",
    "profile": "profile",
    "generation_config": "settings",
    "config": "settings",
    "preprocessor_config": "settings",
    "embedding": "embedding",
    "tokenizer_rules": "tokenizer",
    "gguf_header": "gguf",
    "gguf": "gguf",
    "journal": "journal",
    "tokenizer": "tokenizer",
    "template": "template",
    "image": "image",
    "onnx": "onnx",
    "split": "onnx",
    "http": "http",
}
NAMES = tuple(_MODULES)


def target_of(name: str) -> Target:
    """The target of a name; its libraries are imported now."""
    found = import_module(f"tests.fuzz.targets.{_MODULES[name]}").TARGETS
    made: Target = next(target for target in found if target.name == name)
    return made
