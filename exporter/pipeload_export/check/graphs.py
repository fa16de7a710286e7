"""Is a shard's graph a valid ONNX file whose weights are those that the manifest lists?"""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from pipeload.errors import ExportError
from pipeload.format.manifest import Shard

__all__ = ["check_graph"]

_STANDARD_DOMAINS = ("", "ai.onnx")


def check_graph(directory: Path, shard: Shard) -> None:
    """Check one shard. Its files must have been checked against their sha256 before.

    Raises:
        ExportError: the graph is not valid, or its external data is not what the manifest or the header of the
            weights file says; all faults of the shard are named.
    """
    path = directory / shard.graph.path
    model = onnx.load(path, load_external_data=False)
    # Types and shapes can only be checked through operators whose schema the checker has.
    standard = all(node.domain in _STANDARD_DOMAINS for node in model.graph.node)
    try:
        onnx.checker.check_model(str(path), full_check=standard)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses shard '{shard.name}' ({path}): {error}") from error
    if faults := [*_external_faults(model, shard), *_header_faults(directory, shard)]:
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


def _header_faults(directory: Path, shard: Shard) -> list[str]:
    """Faults of what the manifest says about tensors and tables: each must be one of its file's, or rows of one."""
    specs = [(shard.weights.path, spec) for spec in shard.tensors] if shard.weights else []
    specs += [(lookup.path, lookup.table) for lookup in shard.lookups]
    faults = []
    for name, spec in specs:
        spans = _spans(directory / name)
        whole = spans.get(spec.name)
        if whole is not None and whole != (spec.offset, spec.offset + spec.nbytes):
            faults.append(f"'{spec.name}' is at bytes {whole} of '{name}', the manifest says {spec.offset}")
        elif whole is None and not any(a <= spec.offset and spec.offset + spec.nbytes <= b for a, b in spans.values()):
            faults.append(f"'{spec.name}' is no tensor of '{name}', nor part of one")
    return faults


def _spans(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and end of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begin = 8 + length
    return {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }
