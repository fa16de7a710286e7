"""Where the weights of a checkpoint and the model that its config describes do not fit together.

transformers fills a weight that the checkpoint lacks with random numbers, and drops one that the model has no place
for; both with no more than a warning. Here they are refused by name, with two exceptions. A missing weight that no
output of the graph depends on, such as the pooler of a checkpoint for masked words, is no fault: it is NaN while the
model is traced, and the graph must be free of NaN. And a head that the task leaves out may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeload_export.source.folder import read_json
from pipeload_export.source.refused import Refused
from pipeload_export.source.task import task_of_config

__all__ = ["Gaps", "load_whole", "refuse_missing", "unused_of"]

_SEED = 0
_MOST_NAMES = 4
_BUFFERS = re.compile(
    r"(masked_bias|attn\.bias|attention\.bias|inv_freq|(cos|sin)_cached|position_ids|embed_positions\._float_tensor)$"
)
"""Ends of the names of constants that older versions of transformers stored, and now make from the config."""


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that do not fit, by the model's names.

    Attributes:
        missing: not in the checkpoint, or there in another shape.
        unused: in the checkpoint, inside of what the model runs, where the model has no such weight.
    """

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def load_whole(kind: Any, folder: Path, *, allow_missing: bool, **options: Any) -> tuple[Any, Gaps]:
    """A model of the class `kind` of transformers, and what its checkpoint lacks.

    Missing weights are NaN, or if they are allowed random numbers: the same at each call.

    Raises:
        Refused: the checkpoint has weights of other shapes, or such as the model does not use, and they are not
            allowed.
    """
    import torch

    torch.manual_seed(_SEED)
    model, found = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    missing = [name for name in found["missing_keys"] if model.get_parameter_or_buffer(name).is_floating_point()]
    parameters = dict(model.named_parameters())
    if frozen := [name for name in missing if name in parameters and not parameters[name].requires_grad]:
        # Tables of sines that a class computes, and leaves out of its checkpoints: the same with any seed.
        torch.manual_seed(_SEED + 1)
        again = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
        computed = {name for name in frozen if torch.equal(parameters[name], again.get_parameter(name))}
        missing = [name for name in missing if name not in computed]
    misfits = sorted(_named(found["mismatched_keys"]))
    unused = tuple(sorted(unused_of(model, found["unexpected_keys"])))
    if not allow_missing:
        who = type(model).__name__
        if misfits:
            raise Refused(
                f"{_count(misfits)} of the checkpoint has another shape than {who} has by its config.json: "
                f"{_listed(misfits)}. Take the config.json that belongs to the weights, or pass the --task that "
                "they were made for."
            )
        if unused:
            raise Refused(
                f"{_count(unused)} of the checkpoint has no place in {who} as its config.json describes it: "
                f"{_listed(unused)}. The answers would not be the checkpoint's. Take the config.json that belongs to "
                "the weights, or pass --allow-missing."
            )
        with torch.no_grad():
            for name in missing:
                model.get_parameter_or_buffer(name).fill_(float("nan"))
    return model, Gaps(missing=tuple(sorted({*missing, *misfits})), unused=unused)


def refuse_missing(graphs: Iterable[Path], gaps: Gaps, model: str, task: str, folder: Path) -> None:
    """Raise Refused if a missing weight, which is NaN, has become a part of a graph.

    Args:
        graphs: the `.onnx` files that were traced.
        gaps: what the checkpoint lacks.
        model: the class of the model.
        task: the task that it was traced for.
        folder: the checkpoint.
    """
    if not gaps.missing or not any(map(_has_nan, graphs)):
        return
    config = read_json(folder / "config.json")
    made_for = task_of_config(config)
    architectures = config.get("architectures")
    other = f"--task {made_for}, or " if made_for not in (None, task) else ""
    raise Refused(
        f"the checkpoint lacks {_count(gaps.missing)} of {model}: {_listed(gaps.missing)}. Random numbers would take "
        f"their place. Its config.json names {_listed(architectures) if architectures else 'no architecture'}. Pass "
        f"{other}a complete checkpoint, or --allow-missing to go on with random numbers."
    )


def _named(mismatched: Iterable[Any]) -> Iterator[str]:
    for entry in mismatched:
        yield entry if isinstance(entry, str) else str(entry[0])


def unused_of(model: Any, names: Iterable[str]) -> Iterator[str]:
    """Those of the names that lie inside of what the model runs, not in a head that it leaves out."""
    base = model.base_model_prefix
    modules = dict(model.named_modules())
    trunk = base if base in modules else ""
    buffers = {name for name, _ in model.named_buffers()}
    for name in names:
        # transformers takes the prefix off where it has added it.
        full = f"{trunk}.{name}" if trunk and name.partition(".")[0] not in modules else name
        if {name, full} & buffers or _BUFFERS.search(name):
            continue
        owner = next(path for path in _ancestors(full) if path in modules)
        if owner in ("", trunk):
            continue
        in_head = trunk and not owner.startswith(f"{trunk}.")
        # A head may lack whole parts of the checkpoint's, such as BERT's for the next sentence.
        if not in_head or next(modules[owner].parameters(recurse=False), None) is not None:
            yield name


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _has_nan(graph: Path) -> bool:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph, load_external_data=False).graph
    constants = (attribute.t for node in model.node if node.op_type == "Constant" for attribute in node.attribute)
    for tensor in (*model.initializer, *constants):
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            # One at a time: the weights may be larger than memory.
            values = numpy_helper.to_array(tensor, base_dir=str(graph.parent))
            if values.size and np.isnan(values.min()):
                return True
    return False


def _count(names: Sequence[str]) -> str:
    return "1 weight" if len(names) == 1 else f"{len(names)} weights"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
