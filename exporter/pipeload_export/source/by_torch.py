"""A model of transformers -> an ONNX graph, by torch's own exporter, for versions of transformers that optimum lacks.

That exporter follows symbolic sizes through the model's code instead of one run. It knows inputs by their places only,
and no caches, so the model is exported as a function of a list of tensors:

```
[input_ids, attention_mask, position_ids, past_key_values.0.key, past_key_values.0.value, ...]
 -> [logits, present.0.key, present.0.value, ...]
```
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeload_export.extra import how_to_install
from pipeload_export.source.refused import Refused

__all__ = ["trace"]

_BATCH, _LENGTH, _PAST = 2, 5, 7
"""Sizes of the sample: those of 0 and 1 would count as fixed, and equal ones as one."""
_OPSET = 18
_INLINE_BYTES = 1 << 30
"""Larger models have their weights in a file of their own."""
_IMAGE_SIZE = 224

_TEXT = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state", "image_embeds", "text_embeds"),
    "question-answering": ("start_logits", "end_logits"),
}
"""Task -> outputs, if the model has them. All other tasks have logits."""
_CACHES = ("past_key_values", "cache")
"""Names of the argument that holds a decoder's cache."""

Sizes = dict[int, str]
"""Number of a dimension -> the name of its size."""


def trace(model: Any, folder: Path, *, task: str, opset: int | None) -> None:
    """Write the model's graph and configs into the folder.

    Raises:
        Refused: the model takes or keeps what pipeload has no inputs for.
    """
    import torch

    model.eval()
    inputs, sizes = _sample(model)
    outputs = _outputs(model, inputs, task)
    caches = _caches(model, inputs) if task.startswith("text-generation") else []
    if caches:
        inputs, sizes = _continued(model, inputs, sizes)
    names = [*inputs, *(f"past_key_values.{name}" for name in _names(caches))]
    values = [*inputs.values(), *(part for pair in caches for part in pair)]
    dims = [*(sizes[name] for name in inputs), *({0: "batch_size", 2: "past_sequence_length"} for _ in _names(caches))]
    with torch.no_grad():
        program = torch.onnx.export(
            _flat(model, list(inputs), outputs),
            (values,),
            # Not by name: a size with a name may have no limit, as positions have one.
            dynamic_shapes=([dict.fromkeys(each, torch.export.Dim.DYNAMIC) for each in dims],),
            input_names=names,
            output_names=[*outputs, *(f"present.{name}" for name in _names(caches))],
            opset_version=opset or _OPSET,
            dynamo=True,
            verbose=False,
        )
    _name_sizes(program, dims)
    large = sum(tensor.nbytes for tensor in model.parameters()) > _INLINE_BYTES
    program.save(folder / "model.onnx", external_data=large)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _flat(model: Any, names: Sequence[str], outputs: Sequence[str]) -> Any:
    """The model as a module whose `forward` takes a list of tensors: inputs by these names, then its caches."""
    import torch
    from transformers import DynamicCache

    class Flat(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, values: list[Any]) -> list[Any]:
            pasts = values[len(names) :]
            cache = DynamicCache(list(zip(pasts[::2], pasts[1::2], strict=True))) if pasts else None
            given = dict(zip(names, values, strict=False)) | _cached(self.model, cache)
            found = self.model(**given, return_dict=True)
            kept = [part for layer in cache.layers for part in (layer.keys, layer.values)] if cache else []
            return [*(found[name] for name in outputs), *kept]

    return Flat()


def _sample(model: Any) -> tuple[dict[str, Any], dict[str, Sizes]]:
    """Inputs, and which of their sizes are free."""
    import torch

    taken = inspect.signature(model.forward).parameters
    if {"input_ids", "pixel_values"} <= taken.keys():
        raise Refused(
            "it takes texts and images, and torch's exporter is used for models of one of them. optimum exports it, in "
            f"an environment with transformers 4: {how_to_install()}."
        )
    random = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        shape = (_BATCH, getattr(model.config, "num_channels", 3), *_image_size(model.config))
        return {"pixel_values": torch.randn(shape, generator=random)}, {"pixel_values": {0: "batch_size"}}
    if model.main_input_name != "input_ids":
        raise Refused(f"its main input is '{model.main_input_name}', and pipeload runs models of texts and images.")
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (_BATCH, _LENGTH), generator=random)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if (getattr(config, "type_vocab_size", None) or 0) < 2:
        del given["token_type_ids"]
    inputs = {name: given[name] for name in _TEXT if name in taken and name in given}
    return inputs, {name: {0: "batch_size", 1: "sequence_length"} for name in inputs}


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _outputs(model: Any, inputs: Mapping[str, Any], task: str) -> list[str]:
    import torch

    with torch.no_grad():
        found = model(**inputs, **_cached(model, None), return_dict=True)
    names = [name for name in _OUTPUTS.get(task, ("logits",)) if torch.is_tensor(found.get(name))]
    if not names:
        raise Refused(f"its outputs for {task} are {', '.join(found)}: none that pipeload has a name for.")
    return names


def _cached(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that give a model its cache, or forbid it one."""
    taken = inspect.signature(model.forward).parameters
    if cache is None:
        return {"use_cache": False} if "use_cache" in taken else {}
    name = next((name for name in _CACHES if name in taken), None)
    if name is None:
        raise Refused("it keeps no keys and values, and would run the whole text again for every token.")
    return {name: cache, "use_cache": True}


def _caches(model: Any, inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """A sample of the keys and values that each layer keeps."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **_cached(model, cache), return_dict=True)
    random = torch.Generator().manual_seed(1)
    pairs = []
    for layer in cache.layers:
        kept: list[Any] = [getattr(layer, name, None) for name in ("keys", "values")]
        if any(part is None or part.dim() != 4 or part.shape[2] != _LENGTH for part in kept):
            raise Refused("its layers keep something else than keys and values of each token.")
        shapes = [(_BATCH, part.shape[1], _PAST, part.shape[3]) for part in kept]
        pairs.append(tuple(torch.randn(shape, generator=random) for shape in shapes))
    return pairs


def _continued(
    model: Any, inputs: Mapping[str, Any], sizes: Mapping[str, Sizes]
) -> tuple[dict[str, Any], dict[str, Sizes]]:
    """The inputs behind a past."""
    import torch

    more = {**inputs, "attention_mask": torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64)}
    free = {**sizes, "attention_mask": {0: "batch_size", 1: "past_sequence_length + sequence_length"}}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = torch.arange(_PAST, _PAST + _LENGTH).repeat(_BATCH, 1)
        free["position_ids"] = {0: "batch_size", 1: "sequence_length"}
    return more, free


def _names(caches: Sequence[Any]) -> list[str]:
    return [f"{layer}.{kind}" for layer in range(len(caches)) for kind in ("key", "value")]


def _name_sizes(program: Any, dims: Iterable[Sizes]) -> None:
    """Sizes have the names that they were given, in place of the exporter's symbols."""
    import onnx_ir

    graph = program.model.graph
    names: dict[str, str] = {}
    for value, sizes in zip(graph.inputs, dims, strict=True):
        given = list(value.shape)
        # The exporter finds sums by itself, and has no symbol of its own for some.
        names |= {str(given[place]): size for place, size in sizes.items() if size.isidentifier()}
        value.shape = onnx_ir.Shape([sizes.get(place, size) for place, size in enumerate(given)])
    for value in (*graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size))
