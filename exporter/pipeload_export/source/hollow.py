"""A checkpoint -> its model with the weights left where they are.

A hollow model has all modules of transformers' own, and parameters of the right shapes in memory that was never
written: the system gives such memory no pages, and reads zeros from it. Each parameter knows its tensor of the
checkpoint, and a tensor of torch knows by its address which parameter it is a view of.

Where the checkpoint and the model do not fit together name by name, the hollow way is declined.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pipeload_export.source.folder import weight_files
from pipeload_export.source.gaps import unused_of
from pipeload_export.source.places import ITEM_BYTES, Place, Places, bytes_at, elements_of, places_in
from pipeload_export.source.refused import Declined, reason

__all__ = ["Hollow", "Parameter", "hollow_model", "places_in_folder"]

_FILLED_BYTES = 256 << 10
"""Smaller parameters have their values: torch computes with some, such as 1 + the weight of a norm."""
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's flag, which older versions of Python do not name: addresses may be more than the memory there is."""


@dataclass(slots=True, eq=False)
class Parameter:
    """One parameter of a hollow model, float32.

    Attributes:
        name: of the model; where several modules share it, the first of its names.
        begin: its first byte in the memory of all.
        place: its tensor in the checkpoint; None if that lacks it.
        tensor: the parameter.
        always: it has its values all the time.
    """

    name: str
    begin: int
    place: Place | None
    tensor: Any
    always: bool = False

    def fill(self) -> None:
        """Read the values. Raises Declined if the checkpoint has none."""
        if self.place is None:
            raise Declined(f"the checkpoint lacks {self.name}")
        _read(self.place, self.tensor)


class Hollow:
    """A hollow model.

    Args:
        model: of transformers, in float32; its parameters are given memory here.
        tensors: the checkpoint's tensors by the model's names.

    Attributes:
        model: the model.
    """

    def __init__(self, model: Any, tensors: Places) -> None:
        self.model = model
        owners: dict[int, list[tuple[Any, str, str]]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((module, name, f"{path}.{name}".lstrip(".")))
        self._begins: list[int] = []
        end = 0
        for (module, name, _), *_ in owners.values():
            # Whole pages, which come and go alone.
            self._begins.append(end)
            end += -(-max(module._parameters[name].numel(), 1) * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, ValueError) as error:
            raise Declined(f"the system gives no {end} bytes of addresses ({error})") from error
        self._address, self._end = self._give(owners, tensors)

    def parameter_of(self, tensor: Any) -> Parameter | None:
        """The parameter that a tensor is a view of; None if it is a view of none."""
        address = tensor.data_ptr()
        if not self._address <= address < self._end:
            return None
        return self._parameters[bisect_right(self._begins, address - self._address) - 1]

    def offset_in(self, parameter: Parameter, tensor: Any) -> int:
        """The element of the parameter at which a view of it begins."""
        return int(tensor.data_ptr() - self._address - parameter.begin) // 4

    def empty(self, parameter: Parameter) -> None:
        """Give the memory of the values back."""
        if not parameter.always:
            self._memory.madvise(mmap.MADV_DONTNEED, parameter.begin, max(parameter.tensor.numel() * 4, 1))

    def _give(self, owners: dict[int, list[tuple[Any, str, str]]], tensors: Places) -> tuple[int, int]:
        """Give the parameters memory. Returns the first address, and the one behind the last."""
        import torch

        flat = torch.frombuffer(self._memory, dtype=torch.float32)
        self._parameters: list[Parameter] = []
        for begin, shared in zip(self._begins, owners.values(), strict=True):
            first, own, _ = shared[0]
            given = first._parameters[own]
            names = [full for _, _, full in shared]
            if given.dtype != torch.float32:
                raise Declined(f"its parameter {names[0]} is {given.dtype}")
            part = flat[begin // 4 : begin // 4 + given.numel()].view(given.shape)
            made = torch.nn.Parameter(part, requires_grad=given.requires_grad)
            for module, name, _ in shared:
                module._parameters[name] = made
            place = _tensor_of(names, given, tensors)
            parameter = Parameter(name=names[0], begin=begin, place=place, tensor=part)
            if place and part.numel() * 4 <= _FILLED_BYTES:
                parameter.always = True
                parameter.fill()
            self._parameters.append(parameter)
        return flat.data_ptr(), flat.data_ptr() + len(self._memory)


def hollow_model(make: Callable[[], Any], places: Callable[[Any], Places]) -> Hollow:
    """A hollow model.

    Args:
        make: makes the model of transformers from its config.
        places: where the weights of that model lie, by its names.

    Raises:
        Declined: the checkpoint and the model do not fit together name by name, or the model's code needs weights.
    """
    from transformers.modeling_utils import no_init_weights

    try:
        with no_init_weights(), _without_values():
            model = make().eval()
            model.tie_weights()
        mine = places(model)
    except Declined:
        raise
    except Exception as error:  # whatever the model's code raises where its weights are not there
        raise Declined(f"the model cannot be made without weights ({reason(error)})") from error
    _read_buffers(model, mine)
    return Hollow(model, mine)


def places_in_folder(model: Any, checkpoint: Path) -> Places:
    """Where the weights of a model lie in a checkpoint folder with safetensors files, by the model's names.

    Raises:
        Declined: the checkpoint has tensors that the model has no place for, or several of one name.
    """
    tensors = places_in(weight_files(checkpoint))
    renamed = _renamed(model, list(tensors))
    mine = {new: tensors[old] for old, new in renamed.items()}
    if len(mine) < len(renamed):
        raise Declined("several tensors of the checkpoint have one name in the model")
    known = model.state_dict().keys()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = [renamed.get(name, name) for name in tensors]
    left = [name for name in names if name not in known and not any(pattern.search(name) for pattern in ignored)]
    if unused := sorted(unused_of(model, left)):
        raise Declined(f"the model has no place for the checkpoint's {unused[0]}")
    return mine


@contextmanager
def _without_values() -> Iterator[None]:
    """A context in which new modules have parameters of a shape and without values."""
    import torch

    register = torch.nn.Module.register_parameter

    def put(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(torch.nn.Module, "register_parameter", put):
        yield


def _renamed(model: Any, names: list[str]) -> dict[str, str]:
    """Name in the checkpoint -> name in the model, by transformers' own rules."""
    prefix = model.base_model_prefix
    has, expects = any(name.startswith(prefix) for name in names) if prefix else False, hasattr(model, prefix)
    found: dict[str, str] = model._get_key_renaming_mapping(
        names,
        loading_base_model_from_task_state_dict=has and not expects and bool(prefix),
        loading_task_model_from_base_state_dict=expects and not has and bool(prefix),
    )
    return found


def _read_buffers(model: Any, tensors: Places) -> None:
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise Declined(f"its buffer {name} is computed from weights")
        if name in kept and buffer.is_floating_point():
            place = _tensor_of([name], buffer, tensors)
            if place is None:
                raise Declined(f"the checkpoint lacks {name}")
            _read(place, buffer)


def _read(place: Place, target: Any) -> None:
    """Read a whole tensor of the checkpoint into a contiguous one of torch."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if not place.elements:
        return
    if place.columns:
        with torch.no_grad():
            target.view(-1).copy_(torch.from_numpy(elements_of(place)))
        return
    with torch.no_grad(), bytes_at(place) as data:
        given = torch.frombuffer(data, dtype=kinds[place.dtype])
        target.view(-1).copy_(given)
        del given  # the file stays open as long as it is there


def _tensor_of(names: list[str], given: Any, tensors: Places) -> Place | None:
    """The checkpoint's tensor of a parameter that has these names."""
    found = [tensors[name] for name in names if name in tensors]
    if not found:
        return None
    if len(found) > 1:
        raise Declined(f"the checkpoint has {names[0]} more than once")
    if found[0].shape != tuple(given.shape):
        raise Declined(f"the checkpoint's {names[0]} has the shape {list(found[0].shape)}, not {list(given.shape)}")
    if found[0].dtype not in ITEM_BYTES and not found[0].columns:
        raise Declined(f"the checkpoint's {names[0]} is {found[0].dtype}")
    return found[0]
