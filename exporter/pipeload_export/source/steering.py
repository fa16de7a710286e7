"""Declines the trace of a hollow model that the values of weights steer, such as a loop over chosen experts.

A tensor that is computed from empty weights is *weighted*; one whose size depends on the values of a weighted one
(where a mask is true, for instance) is *sized*. Operations on both are traced like any other. But where Python reads a
value of the first or a size of the second, the trace would be another one with the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import Any
from unittest import mock

from pipeload_export.source.hollow import Hollow
from pipeload_export.source.refused import Declined

__all__ = ["not_steered"]

_READING = ("__bool__", "__contains__", "__float__", "__index__", "__int__", "equal", "is_nonzero", "item", "tolist")
"""Functions of tensors whose result is a number of Python's."""
_MEASURING = ("__iter__", "__len__", "nelement", "numel", "size")
"""Functions of tensors whose result is a size."""
_SIZING = frozenset({"_unique", "_unique2", "bincount", "masked_select", "nonzero", "nonzero_numpy", "unique_dim"})
"""Operations whose result has a size that depends on values."""
_PUTTING = ("copy", "index_add", "index_copy", "index_put", "masked_scatter", "scatter")
"""Beginnings of the names of operations whose result has the size of their first tensor."""
_UNRECORDED = "convolution"
"""The operation that torch's tracer records as another one inside of it, which it does not see where a mode of
operations stands in between: the result would be a constant."""
_CONVOLVING = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", _UNRECORDED)
"""Functions that do it."""
_WEIGHTED, _SIZED = "_pipeload_weighted", "_pipeload_sized"


@contextmanager
def not_steered(hollow: Hollow) -> Iterator[None]:
    """A context in which the model's forward pass raises Declined if empty weights steer it."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves

    sizes = {*(getattr(torch.Tensor, name) for name in _MEASURING), torch.Tensor.shape.__get__}
    values = {*(getattr(torch.Tensor, name) for name in _READING), torch.equal}
    convolving = {getattr(torch, name) for name in _CONVOLVING}

    def tensors_in(*values: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(values) if torch.is_tensor(leaf)]

    def is_weighted(tensor: Any) -> bool:
        if getattr(tensor, _WEIGHTED, False):
            return True
        parameter = hollow.parameter_of(tensor)
        return parameter is not None and not parameter.always

    def is_sized(tensor: Any) -> bool:
        return getattr(tensor, _SIZED, False)

    def marked(found: Any, *, weighted: bool, sized: bool) -> Any:
        for tensor in tensors_in(found):
            for mark, holds in ((_WEIGHTED, weighted), (_SIZED, sized)):
                if holds:
                    setattr(tensor, mark, True)
        return found

    class Operations(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("aten::")
            if name == _UNRECORDED and torch._C._get_tracing_state() is not None:
                raise Declined("the trace would lack a convolution of it")
            given = tensors_in(args, kwargs)
            weighted = any(map(is_weighted, given))
            masks = [one for one in given[1:] if name == "index" and one.dtype in (torch.bool, torch.uint8)]
            sizing = (weighted and name in _SIZING) or any(map(is_weighted, masks))
            sources = given[:1] if name.startswith(_PUTTING) else given
            sized = sizing or any(map(is_sized, sources))
            return marked(func(*args, **(kwargs or {})), weighted=weighted, sized=sized)

    class Functions(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = tensors_in(args, kwargs)
            by_size = func in sizes and is_sized(args[0])
            if by_size or (func in values and any(map(is_weighted, given))):
                raise Declined(_STEERED)
            if func not in convolving:
                return func(*args, **(kwargs or {}))
            weighted, sized = any(map(is_weighted, given)), any(map(is_sized, given))
            with _disable_current_modes():
                return marked(func(*args, **(kwargs or {})), weighted=weighted, sized=sized)

    watching = ExitStack()

    def begin(*_: Any) -> None:
        watching.enter_context(Functions())
        watching.enter_context(Operations())

    def end(*_: Any) -> None:
        watching.close()

    # The pass alone: torch's exporter computes with constants afterwards.
    hooks = [
        hollow.model.register_forward_pre_hook(begin),
        hollow.model.register_forward_hook(end, always_call=True),
    ]
    watchers = (Functions.__torch_function__.__code__, Operations.__torch_dispatch__.__code__)
    lookup = _lookup_past(watchers, torch.jit._trace._create_interpreter_name_lookup_fn)
    try:
        with mock.patch.object(torch.jit._trace, "_create_interpreter_name_lookup_fn", lookup):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _lookup_past(watchers: Collection[CodeType], original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch names some values of a graph as a variable some frames up; here frames of watchers do not count."""
    from torch.overrides import handle_torch_function

    def create(frames_up: int = 1) -> Callable[[Any], str]:
        def name_of(tensor: Any) -> str:
            frame, up, left = sys._getframe(), 0, frames_up + 1
            while left and frame.f_back:
                frame, up = frame.f_back, up + 1
                if frame.f_code is handle_torch_function.__code__:
                    # The function above tells of itself, then it is called anew.
                    left += 1
                elif frame.f_code not in watchers:
                    left -= 1
            return str(original(up)(tensor))

        return name_of

    return create


_STEERED = "the values of its weights decide what the model computes"
