"""Is a shard's graph a valid ONNX file whose weights are those that the manifest lists?"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from pipeload.errors import ExportError
from pipeload.format.manifest import Shard
from pipeload_export.graph.validity import check_model

__all__ = ["check_graph"]


def check_graph(directory: Path, shard: Shard) -> None:
    """Check one shard. Its files must have been checked against their sha256 before.

    Raises:
        ExportError: the graph is not valid, or its external data is not what the manifest says; all faults of the
            shard are named.
    """
    try:
        model = onnx.load(directory / shard.graph.path, load_external_data=False)
        check_model(model)
    except (DecodeError, ExportError) as error:
        raise ExportError(f"onnx.checker refuses shard '{shard.name}' ({shard.graph.path}): {error}") from error
    if faults := _external_faults(model, shard):
        raise ExportError(f"Shard '{shard.name}' is inconsistent: {'; '.join(faults)}. Export the model again.")


def _external_faults(model: onnx.ModelProto, shard: Shard) -> list[str]:
    """Faults of the graph's external data, which must be the manifest's tensors exactly."""
    folder = Path(shard.graph.path).parent
    listed = {spec.name: spec for spec in shard.tensors}
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (
                str(folder / entries["location"]),
                int(entries.get("offset", 0)),
                int(entries.get("length", -1)),
                tuple(tensor.dims),
            )
    faults = [f"the graph takes '{name}' from a file, the manifest does not list it" for name in found.keys() - listed]
    faults += [f"the manifest lists '{name}', which the graph does not take" for name in listed.keys() - found]
    for name in found.keys() & listed:
        spec = listed[name]
        assert shard.weights is not None, "the manifest was validated"
        expected = (shard.weights.path, spec.offset, spec.nbytes, spec.shape)
        if found[name] != expected:
            faults.append(f"the graph takes '{name}' from {found[name]}, the manifest says {expected}")
    return faults
