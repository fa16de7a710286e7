"""Every node of a graph gets its shard; a tensor that is made in one and used in another becomes an edge.

```
pre          indices of tables, where the graph computes them: the engine looks up rows before a shard runs
prologue     the activation before the first block, and tensors that several shards share (masks, rotary tables, shapes)
block 0 ...  one layer each, with everything that only this layer needs
epilogue     the activation behind the last block
```
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeload.format.manifest import Role
from pipeload_export.cut.blocks import Cuts
from pipeload_export.cut.tables import Lift
from pipeload_export.graph.graph import Graph, node_inputs

__all__ = ["SHAPE_OPS", "Piece", "place"]

_LARGE = 1.5
"""A prologue or epilogue with more weights than this many blocks is cut as well."""
SHAPE_OPS = ("Shape", "Size")
"""Operators that read a tensor's shape, and not its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One shard to be.

    Attributes:
        name: the shard's name.
        role: prologue, block or epilogue.
        nodes: indices of its nodes, in order, those on constants included.
        inputs: tensors that it takes, in the order of their first use.
        outputs: tensors that it makes for other shards or for the caller.
    """

    name: str
    role: Role
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def place(graph: Graph, cuts: Cuts, lifts: Sequence[Lift], *, kept: Iterable[str] = ()) -> list[Piece]:
    """Distribute the nodes of a graph over shards.

    Args:
        graph: with the lifted tables and the cut head taken out.
        cuts: of the same graph before that.
        lifts: the tables.
        kept: tensors besides the graph's outputs that must leave their shard, such as the head's input.
    """
    constant = graph.constant_sources()
    roles, of_segment = _roles(graph, cuts, constant)
    pinned = {name: of_segment[i] for i, names in enumerate(cuts.segments) for name in names}
    shard_of = _shards(graph, pinned, constant, _needed(graph, [lift.indices for lift in lifts]))
    made = {name: shard_of[i] for i, n in enumerate(graph.nodes) if i in shard_of for name in n.output if name}
    used: dict[str, set[int]] = {}
    for index, shard in shard_of.items():
        for name in node_inputs(graph.nodes[index]):
            used.setdefault(name, set()).add(shard)
    leaving = {*graph.output_names, *kept, *(lift.indices for lift in lifts)}
    leaving.update(name for name, shard in made.items() if used.get(name, set()) - {shard})
    pieces: list[tuple[Role, Piece]] = []
    for shard, role in enumerate(roles):
        own = [index for index, place in shard_of.items() if place == shard]
        if own:
            pieces.append((role, _piece(graph, sorted(own), constant, leaving)))
    return _named(pieces)


def _roles(graph: Graph, cuts: Cuts, constant: dict[str, frozenset[str]]) -> tuple[list[Role], list[int]]:
    """The role of each shard, and the shard of each segment. Shard 0 is for indices, shard 1 for shared tensors."""
    producers = {name: node for node in graph.nodes for name in node.output}
    sizes = []
    for segment in cuts.segments:
        names = {n for made in segment if made in producers for n in node_inputs(producers[made])}
        weights = frozenset().union(*(constant.get(name, ()) for name in names))
        sizes.append(sum(graph.constants[name].nbytes for name in weights))
    last = cuts.first + cuts.period * cuts.count
    if not cuts.count:
        return ["prologue", "block"], [1] * len(cuts.segments)
    roles: list[Role] = ["prologue", "prologue"]
    of_segment = _grouped(sizes[: cuts.first], cuts.block_bytes, roles, "prologue")
    for _ in range(cuts.count):
        roles.append("block")
        of_segment += [len(roles) - 1] * cuts.period
    roles.append("epilogue")
    return roles, of_segment + _grouped(sizes[last:], cuts.block_bytes, roles, "epilogue")


def _grouped(sizes: Sequence[int], block_bytes: int, roles: list[Role], role: Role) -> list[int]:
    """Shards of consecutive segments, all in the latest shard unless they hold much more than a block together."""
    result: list[int] = []
    gathered = 0
    for size in sizes:
        if sum(sizes) > _LARGE * block_bytes and gathered and gathered + size > block_bytes:
            roles.append(role)
            gathered = 0
        gathered += size
        result.append(len(roles) - 1)
    return result


def _needed(graph: Graph, names: Iterable[str]) -> set[int]:
    """Indices of the nodes that the tensors are computed by."""
    needed, result = set(names), set[int]()
    for index in range(len(graph.nodes) - 1, -1, -1):
        if needed.intersection(graph.nodes[index].output):
            needed.update(node_inputs(graph.nodes[index]))
            result.add(index)
    return result


def _shards(
    graph: Graph, pinned: dict[str, int], constant: dict[str, frozenset[str]], first: set[int]
) -> dict[int, int]:
    """Node -> shard, for all that do not depend on constants only."""
    outputs = set(graph.output_names)
    earliest: dict[int, int] = {}
    available: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        places = [pinned[name] for name in node.output if name in pinned]
        if places:
            earliest[index] = places[0]
        elif index in first:
            earliest[index] = 0
        else:
            earliest[index] = max((available.get(name, 1) for name in node_inputs(node)), default=1)
        available.update((name, max(earliest[index], 1)) for name in node.output)
    result: dict[int, int] = {}
    users: dict[str, set[int]] = {}
    active_users: dict[str, set[int]] = {}
    for index in _from_the_end(graph):
        node = graph.nodes[index]
        wanted = {place for name in node.output for place in users.get(name, ())}
        fixed = index in first or any(name in pinned for name in node.output)
        if not fixed and constant.keys() >= set(node.output) and not outputs.intersection(node.output):
            continue
        shard = earliest[index]
        if not fixed and len(wanted) == 1 and not _is_better_early(node.op_type, node.input, wanted, active_users):
            shard = max(shard, *wanted)
        result[index] = shard
        for name in node_inputs(node):
            users.setdefault(name, set()).add(shard)
            if node.op_type not in SHAPE_OPS:
                active_users.setdefault(name, set()).add(shard)
    return dict(sorted(result.items()))


def _from_the_end(graph: Graph) -> list[int]:
    """Indices of the nodes, each behind its users, and a tensor's shapes behind all other users of the tensor.

    Only then is it known whether the shard that asks for a shape has the tensor itself: of a decoder whose blocks ask
    for the lengths of their own caches, no other shard takes all caches.
    """
    keys: list[tuple[int, ...]] = []
    made: dict[str, tuple[int, ...]] = {}
    for index, node in enumerate(graph.nodes):
        keys.append((*made.get(node.input[0], (-1,)), index) if node.op_type in SHAPE_OPS else (index,))
        made.update(dict.fromkeys(node.output, keys[-1]))
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)


def _is_better_early(op_type: str, inputs: Sequence[str], places: set[int], active_users: dict[str, set[int]]) -> bool:
    """Whether to make a shape where its tensor is made: the tensor itself does not travel to the shard that asks."""
    return op_type in SHAPE_OPS and not places <= active_users.get(inputs[0], set())


def _piece(graph: Graph, nodes: list[int], constant: dict[str, frozenset[str]], leaving: set[str]) -> Piece:
    """A shard of these nodes, with the nodes that make its constants, and without a name."""
    wanted = {name for index in nodes for name in node_inputs(graph.nodes[index]) if name in constant}
    members = set(nodes)
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        if index not in members and wanted.intersection(node.output):
            members.add(index)
            wanted.update(node_inputs(node))
    order = sorted(members)
    made = {name for index in order for name in graph.nodes[index].output if name}
    taken = (name for index in order for name in node_inputs(graph.nodes[index]))
    return Piece(
        name="",
        role="block",
        nodes=tuple(order),
        inputs=tuple(dict.fromkeys(n for n in taken if n not in made and n not in graph.constants)),
        outputs=tuple(n for index in nodes for n in graph.nodes[index].output if n in leaving),
    )


def _named(pieces: Sequence[tuple[Role, Piece]]) -> list[Piece]:
    roles = [role for role, _ in pieces]
    result = []
    for place, (role, piece) in enumerate(pieces):
        number = roles[:place].count(role)
        name = role if role != "block" and roles.count(role) == 1 else f"{role}.{number:03d}"
        result.append(Piece(name=name, role=role, nodes=piece.nodes, inputs=piece.inputs, outputs=piece.outputs))
    return result
