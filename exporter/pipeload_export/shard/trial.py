"""One shard on sample inputs: its outputs, the order in which its nodes ran, and the sizes of their results."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from pipeload.foreign import first_line
from pipeload.format.dtypes import ITEM_BYTES
from pipeload_export.graph.external_data import external_initializer
from pipeload_export.graph.graph import tensor_proto
from pipeload_export.graph.runtime import (
    LEVEL,
    NOT_APPLIED,
    dtype_of,
    open_session,
    raise_shortage,
    run,
    session_options,
)
from pipeload_export.shard.fuse import Fused

__all__ = ["Arrays", "Event", "Refused", "Trial", "agree", "run_trial"]

Arrays = dict[str, NDArray[Any]]

_CLOSE = 1e-5
"""The most that fused operators may change, relative to the largest value."""
_STEP = 1e-2
"""Likewise, where that moves a value of a cache of int8 to the next step: one of 127."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A node that ran: its index in the graph, and of each of its outputs the bytes of an element and the shape.

    The product of an output's numbers is its size in bytes.
    """

    node: int
    outputs: tuple[tuple[int, ...], ...]


class Refused(Exception):  # noqa: N818 - not an error: it asks for other sizes
    """A shard does not run on inputs of some sizes.

    Attributes:
        places: which of the runs failed.
    """

    def __init__(self, message: str, places: Collection[int]) -> None:
        super().__init__(message)
        self.places = places


class Trial:
    """A session over a shard as the engine makes it; a context manager, which removes its temporary files.

    Args:
        fused: the shard.
        work: a folder for temporary files.
        profile: record which nodes run.
        optimised: let onnxruntime optimise the graph first, with its weights at hand.

    Raises:
        ExportError: onnxruntime does not take the graph.
    """

    def __init__(self, fused: Fused, work: Path, *, profile: bool = False, optimised: bool = False) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".trial-", dir=work)))
            options = session_options()
            if optimised:
                options.graph_optimization_level = LEVEL
            options.enable_profiling = profile
            options.profile_file_prefix = f"{folder}/profile"
            self._values = _add_weights(fused, folder, options, in_file=optimised)
            what, left_out = f"shard '{fused.model.graph.name}'", NOT_APPLIED if optimised else ()
            self._session = open_session(folder / "shard.onnx", what, options, disabled=left_out)
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def run(self, inputs: Sequence[Arrays], outputs: Sequence[str], *, stops: bool = True) -> list[list[NDArray[Any]]]:
        """The outputs for each set of inputs.

        With `stops`, the first inputs that the shard refuses are the last that are tried.

        Raises:
            Refused: the shard does not run on some of the inputs.
        """
        results, failed = [], dict[int, str]()
        for place, arrays in enumerate(inputs):
            try:
                results.append(run(self._session, outputs, arrays))
            except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions have no common base
                raise_shortage(error)
                failed[place] = first_line(error)
                if stops:
                    break
        if failed:
            raise Refused(next(iter(failed.values())), failed.keys())
        return results

    def events(self) -> list[list[Event]]:
        """The nodes of each run, in the order in which they ran. Ends the profile."""
        return _events(json.loads(Path(self._session.end_profiling()).read_text()))


def run_trial(
    fused: Fused,
    inputs: Sequence[Arrays],
    outputs: Sequence[str],
    work: Path,
    *,
    stops: bool = True,
    optimised: bool = False,
) -> tuple[list[list[NDArray[Any]]], list[list[Event]]]:
    """Run a shard, and record which nodes run; see `Trial`.

    Returns:
        For each set of inputs the outputs, and the nodes in the order in which they ran.

    Raises:
        Refused: the shard does not run on some of the inputs.
        ExportError: onnxruntime does not take the graph.
    """
    with Trial(fused, work, profile=True, optimised=optimised) as trial:
        return trial.run(inputs, outputs, stops=stops), trial.events()


def _add_weights(fused: Fused, folder: Path, options: ort.SessionOptions, *, in_file: bool) -> list[ort.OrtValue]:
    """Write the graph into the folder, and give its weights to the session; they must live as long as it does.

    With `in_file` they are inside the graph's file: some optimisers look there, and not at what a session is given.
    """
    model = ModelProto()
    model.CopyFrom(fused.model)
    if in_file:
        for proto in model.graph.initializer:
            if proto.name in fused.external:
                proto.CopyFrom(tensor_proto(proto.name, fused.external[proto.name]))
        onnx.save(model, folder / "shard.onnx")
        return []
    values = []
    for index, proto in enumerate(model.graph.initializer):
        constant = fused.external.get(proto.name)
        if constant is None:
            continue
        # The file must be there, but onnxruntime takes the values that it is given.
        model.graph.initializer[index].CopyFrom(external_initializer(proto.name, constant, "zeros.bin", 0))
        array = np.ascontiguousarray(constant.values()).reshape(constant.shape)
        if constant.dtype == TensorProto.BFLOAT16:
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), constant.dtype)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        values.append(value)
        options.add_initializer(proto.name, value)
    onnx.save(model, folder / "shard.onnx")
    with (folder / "zeros.bin").open("wb") as file:
        file.truncate(max((constant.nbytes for constant in fused.external.values()), default=0))
    return values


def _events(records: Sequence[Mapping[str, Any]]) -> list[list[Event]]:
    """A profile -> the nodes of each run, in the order in which they ran."""
    runs: list[list[Event]] = []
    current: list[Event] = []
    for record in records:
        name, details = str(record.get("name")), record.get("args", {})
        if record.get("cat") == "Node" and name.endswith("_kernel_time"):
            made = [item for entry in details.get("output_type_shape", []) for item in entry.items()]
            event = Event(
                node=int(details["node_index"]),
                outputs=tuple((ITEM_BYTES.get(dtype_of(dtype), 8), *shape) for dtype, shape in made),
            )
            current.append(event)
        elif name == "model_run":
            runs.append(current)
            current = []
    return runs


def agree(wanted: Sequence[Sequence[NDArray[Any]]], found: Sequence[Sequence[NDArray[Any]]]) -> bool:
    """Whether the runs in `wanted` gave the same outputs as the first of those in `found`.

    A value in the middle between two int8 may be rounded to either of them.
    """
    pairs = [pair for one, two in zip(wanted, found, strict=False) for pair in zip(one, two, strict=True)]
    moved = any(a.dtype == np.int8 and not np.array_equal(a, b) for a, b in pairs)
    return all(_equal(a, b, _STEP if moved else _CLOSE) for a, b in pairs)


def _equal(wanted: NDArray[Any], found: NDArray[Any], close: float) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if wanted.dtype == np.int8:
        return bool((np.abs(wanted.astype(np.int16) - found) <= 1).all())
    if not np.issubdtype(wanted.dtype, np.floating):
        return bool(np.array_equal(wanted, found))
    finite = wanted[np.isfinite(wanted)]
    limit = close * float(np.abs(finite).max(initial=0))
    return bool(np.allclose(wanted, found, rtol=close, atol=limit, equal_nan=True))
