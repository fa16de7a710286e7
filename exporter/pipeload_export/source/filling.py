"""A hollow model that answers: each weight is in memory while an operation of torch takes it.

Torch tells of every operation before it is done. So the weights that it takes are read from the checkpoint, widened to
float32, and given back behind it, whatever way the model's code uses them. Memory is that of the largest operation, and
nothing is written to the disk. The answers are those of the model in float32: the same operations on the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeload_export.source.hollow import Hollow

__all__ = ["answering"]


@contextmanager
def answering(hollow: Hollow) -> Iterator[Any]:
    """A context in which the model computes with the checkpoint's weights. Yields the model.

    An operation raises Declined if the checkpoint lacks a weight that it takes.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Filling(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if _is_view(func):
                return func(*args, **(kwargs or {}))
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
            found = {id(one): one for tensor in tensors if (one := hollow.parameter_of(tensor)) and not one.always}
            for parameter in found.values():
                parameter.fill()
            try:
                return func(*args, **(kwargs or {}))
            finally:
                for parameter in found.values():
                    hollow.empty(parameter)

    with Filling():
        yield hollow.model


def _is_view(func: Any) -> bool:
    """Whether an operation gives another view of its tensors, and reads no values."""
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
