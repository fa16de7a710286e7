"""Every pass leaves a graph that is well formed, and says whether it changed something."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.exporter.conftest import ARCHITECTURES
from tests.exporter.graphs import encoder

from pipeload_export.cut.head import HeadCut
from pipeload_export.cut.tables import Lift
from pipeload_export.graph.graph import Graph, node_inputs
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise

SPLIT = importlib.import_module("pipeload_export.split")
PASSES = ("normalise", "write_in_place", "quantise_caches", "lift_tables", "cut_head", "drop_dead")


class EnoughError(Exception):
    """Behind the passes the shards are cut out, which is no business of these tests."""


def faults(graph: Graph, given: Collection[str], gone: Collection[str]) -> Iterator[str]:
    """The faults of a graph.

    Args:
        graph: between two passes.
        given: tensors that a pass took out of the graph, and that a shard is going to be given.
        gone: outputs that a pass took out of the graph.
    """
    names = [value.name for value in graph.inputs] + [*graph.constants, *given]
    names += [name for node in graph.nodes for name in node.output if name]
    yield from (f"'{name}' is made twice" for name in set(names) if names.count(name) > 1)
    known = {*(value.name for value in graph.inputs), *graph.constants, *given}
    for node in graph.nodes:
        missing = set(node_inputs(node)) - known
        yield from (f"{node.op_type} takes '{name}' before it is made, or it never is" for name in sorted(missing))
        known.update(filter(None, node.output))
    yield from (f"output '{name}' is made by no node" for name in set(graph.output_names) - known - set(gone))


def content(graph: Graph) -> tuple[object, ...]:
    """All that a pass may change, but for the types that it finds out."""
    return (
        [node.SerializeToString(deterministic=True) for node in graph.nodes],
        {name: (constant.dtype, constant.shape) for name, constant in graph.constants.items()},
        [value.SerializeToString(deterministic=True) for value in (*graph.inputs, *graph.outputs)],
        dict(graph.opsets),
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, bool]]:
    """A model's file -> name of each pass -> whether it changed the graph; checked behind every pass."""

    def run(path: Path, *, int8_caches: bool) -> dict[str, bool]:
        changed: dict[str, bool] = {}
        given: list[str] = []
        gone: list[str] = []

        def checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(graph: Graph, *args: Any, **options: Any) -> Any:
                before = content(graph)
                result = original(graph, *args, **options)
                given.extend(
                    lift.output for lift in result if isinstance(lift, Lift)
                ) if name == "lift_tables" else None
                gone.extend([result.output] if isinstance(result, HeadCut) else [])
                assert list(faults(graph, given, gone)) == [], name
                changed[name] = bool(result)
                assert changed[name] == (content(graph) != before), f"{name} says whether it changed something"
                return result

            return call

        def stop(*_: object, **__: object) -> NoReturn:
            raise EnoughError

        for name in PASSES:
            monkeypatch.setattr(SPLIT, name, checked(name, getattr(SPLIT, name)))
        monkeypatch.setattr(SPLIT, "place", stop)
        with pytest.raises(EnoughError):
            SPLIT.split(path, tmp_path, int8_caches=int8_caches)
        return changed

    return run


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_graph_is_well_formed_behind_every_pass(
    name: str, architecture: Callable[[str], Path], passes: Callable[..., dict[str, bool]]
) -> None:
    changed = passes(architecture(name), int8_caches=False)
    assert set(changed) == set(PASSES) - {"quantise_caches"} - ({"cut_head"} - set(changed))
    assert changed["normalise"]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_the_graph_is_well_formed_with_caches_of_int8(
    name: str, architecture: Callable[[str], Path], passes: Callable[..., dict[str, bool]]
) -> None:
    changed = passes(architecture(name), int8_caches=True)
    assert changed["write_in_place"]
    assert changed["quantise_caches"]


def test_a_second_time_there_is_nothing_left_to_normalise(tmp_path: Path) -> None:
    import onnx

    onnx.save(encoder().model(), str(tmp_path / "model.onnx"))
    graph = load(tmp_path / "model.onnx")
    assert normalise(graph)
    assert not normalise(graph)
