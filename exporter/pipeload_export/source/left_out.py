"""A hollow model -> its graph, and where in the checkpoint each weight of it lies.

Tracing takes no memory for weights, however many layers there are. The graph is that of the full model, since a trace
records operations and no values. Each weight of the graph is a view of the memory of one parameter (itself, its
transpose, a slice), so its place in the checkpoint is known from addresses and strides: no values are compared.

Weights that torch computes from others, such as those of a convolution with a batch norm in it, have no place: the
hollow way is declined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np

from pipeload_export.source.hollow import Hollow
from pipeload_export.source.places import WEIGHTS_NAME, Place, Weights, first_values, place_of, same_values
from pipeload_export.source.refused import Declined
from pipeload_export.source.steering import not_steered

__all__ = ["weights_left_out"]


@contextmanager
def weights_left_out(hollow: Hollow, folder: Path) -> Iterator[None]:
    """A context in which optimum traces the model; the places of its weights are written into the folder.

    Raises:
        Declined: the places of some are not known.
    """
    import onnxruntime
    import torch

    leaving = _Leaving(hollow)
    passes = {
        "_jit_pass_onnx_eval_peephole": leaving.peephole,
        "_jit_pass_onnx_constant_fold": leaving.fold,
        "_jit_pass_onnx_deduplicate_initializers": leaving.leave_out,
        "_jit_pass_onnx_graph_shape_type_inference": leaving.infer,
    }
    with ExitStack() as stack:
        for name, mine in passes.items():
            stack.enter_context(mock.patch.object(torch._C, name, mine(getattr(torch._C, name))))
        session = _session_with(leaving.places, onnxruntime.InferenceSession)
        stack.enter_context(mock.patch.object(onnxruntime, "InferenceSession", session))
        stack.enter_context(not_steered(hollow))
        yield
    weights = Weights(places=leaving.places, order=leaving.order)
    (folder / WEIGHTS_NAME).write_bytes(msgspec.json.encode(weights))


class _Leaving:
    """Passes of torch's exporter over a hollow model's graph, in the place of its own."""

    def __init__(self, hollow: Hollow) -> None:
        self._hollow = hollow
        self.places: dict[str, Place] = {}
        self.order: list[str] = []

    def peephole(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Where a convolution takes a batch norm in, it computes with weights."""

        def run(graph: Any, params: dict[str, Any]) -> dict[str, Any]:
            before = {tensor.data_ptr() for tensor in params.values()}
            found: dict[str, Any] = original(graph, params)
            if new := [name for name, tensor in found.items() if tensor.data_ptr() not in before]:
                raise Declined(f"the graph's weight {new[0]} is computed from others")
            return found

        return run

    def fold(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Operations on constants: views stay views, and what is computed must not depend on weights."""

        def run(graph: Any, params: dict[str, Any], opset: int) -> dict[str, Any]:
            import torch

            # What becomes NaN where the weights are NaN is computed from them.
            nan = torch.full((1,), float("nan"))
            poisoned = {
                name: nan.expand(tensor.shape) if self._is_empty(tensor) else tensor for name, tensor in params.items()
            }
            outcome = original(graph.copy(), poisoned, opset)
            found: dict[str, Any] = original(graph, params, opset)
            for name, tensor in found.items():
                other = outcome[name]
                if not self._is_empty(tensor) and other.is_floating_point() and bool(other.isnan().any()):
                    raise Declined(f"the graph's weight {name} is computed from others")
            return found

        return run

    def infer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes follow from those of weights; torch would put the values into a model of ONNX."""

        def run(graph: Any, params: dict[str, Any], opset: int) -> None:
            original(graph, {name: tensor for name, tensor in params.items() if not self._is_empty(tensor)}, opset)

        return run

    def leave_out(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Equal weights become one; then they leave the graph, which gets inputs in their place."""

        def run(graph: Any, params: dict[str, Any], training: bool) -> dict[str, Any]:
            import torch

            found: dict[str, Any] = original(graph, self._distinct(params), training)
            self.order += [value.debugName() for value in graph.inputs()]
            kept = {}
            for name in found:
                tensor = params[name]
                parameter = self._hollow.parameter_of(tensor)
                if parameter is None:
                    kept[name] = tensor
                    continue
                if (place := self._place_of(tensor)) is None:
                    raise Declined(f"the checkpoint lacks {parameter.name}")
                if tensor.dtype != torch.float32:
                    raise Declined(f"the graph's weight {name} is {tensor.dtype}")
                self.places[name] = place
            return kept

        return run

    def _distinct(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors, with others in the place of empty memory: their values are equal where those of weights are."""
        import torch

        known: dict[tuple[Any, ...], list[tuple[Any, Place | None, Any]]] = {}
        result, count = dict(params), 0
        for name, tensor in params.items():
            if not self._is_empty(tensor):
                continue
            place = self._place_of(tensor)
            alike = known.setdefault((tensor.shape, tensor.stride(), place and first_values(place)), [])
            for address, other, stand_in in alike:
                if address == tensor.data_ptr() or (place and other and same_values(place, other)):
                    result[name] = stand_in
                    break
            else:
                result[name] = torch.tensor(float(count)).expand(tensor.shape)
                alike.append((tensor.data_ptr(), place, result[name]))
                count += 1
        return result

    def _place_of(self, tensor: Any) -> Place | None:
        """Where a view of a parameter lies; None if the checkpoint lacks the parameter."""
        parameter = self._hollow.parameter_of(tensor)
        if parameter is None or parameter.place is None:
            return None
        return place_of(parameter.place, tensor.shape, tensor.stride(), self._hollow.offset_in(parameter, tensor))

    def _is_empty(self, tensor: Any) -> bool:
        parameter = self._hollow.parameter_of(tensor)
        return parameter is not None and not parameter.always


def _session_with(places: Mapping[str, Place], kind: type) -> type:
    """A session that optimum makes to look at the shapes of outputs: it is given zeros in the place of weights."""

    class Session(kind):  # type: ignore[misc]
        def run(self, names: Any, inputs: Mapping[str, Any], options: Any = None) -> Any:
            # Memory that is never written.
            zeros = {name: np.zeros(place.shape, np.float32) for name, place in places.items()}
            return super().run(names, {**inputs, **zeros}, options)

        def get_inputs(self) -> list[Any]:
            return [value for value in super().get_inputs() if value.name not in places]

    return Session
