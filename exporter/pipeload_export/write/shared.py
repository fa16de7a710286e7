"""Weights that several shards have in common (ALBERT's layers) are stored once: later shards take the first one's."""

from __future__ import annotations

from pipeload_export.graph.graph import Constant, node_inputs
from pipeload_export.shard.fuse import Fused
from pipeload_export.write.names import all_names, rename
from pipeload_export.write.weights import WeightsFile

__all__ = ["SharedWeights", "by_use"]


def by_use(fused: Fused) -> dict[str, Constant]:
    """The graph's external constants in the order in which its nodes take them, which is that of its structure."""
    taken = dict.fromkeys(name for node in fused.model.graph.node for name in node_inputs(node))
    order = [name for name in taken if name in fused.external]
    return {name: fused.external[name] for name in dict.fromkeys([*order, *fused.external])}


class SharedWeights:
    """The weights files of one model's shards."""

    def __init__(self) -> None:
        self._stored: dict[object, WeightsFile] = {}

    def share(self, written: WeightsFile, fused: Fused) -> WeightsFile | None:
        """An earlier file with the same tensors in the same places, whose names the graph takes over; None if none has.

        Args:
            written: the shard's own file.
            fused: the shard's graph.
        """
        assert written.range is not None, "a shard's own file is loaded as a whole"
        begin = written.range.offset
        places = tuple((spec.dtype, spec.shape, spec.offset - begin) for spec in written.tensors)
        stored = self._stored.setdefault((written.range.sha256, places), written)
        if stored is written:
            return None
        pairs = list(zip(written.tensors, stored.tensors, strict=True))
        names = {own.name: known.name for own, known in pairs}
        casts = {own.widened: known.widened for own, known in pairs if own.widened and known.widened}
        graph = fused.model.graph
        if all_names(graph).difference(names, casts).intersection([*names.values(), *casts.values()]):
            return None
        rename(graph, names | casts)
        constants = {names[name]: constant for name, constant in fused.external.items()}
        fused.external.clear()
        fused.external.update(constants)
        return stored
