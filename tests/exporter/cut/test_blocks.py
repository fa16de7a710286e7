"""Blocks are found by structure: whatever the names, the order of the nodes and the odd things between the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto
from tests.exporter.conftest import ARCHITECTURES
from tests.exporter.graphs import (
    WIDTH,
    Builder,
    backwards,
    encoder,
    grouped_decoder,
    load_normalised,
    renamed,
    reordered,
    with_hidden_states,
)

from pipeload.errors import ExportError
from pipeload_export.cut.blocks import Cuts, find_cuts


@pytest.fixture
def cuts_of(tmp_path: Path) -> Callable[..., Cuts]:
    def cuts(model: ModelProto, **options: bool) -> Cuts:
        onnx.save(model, str(tmp_path / "model.onnx"))
        return find_cuts(load_normalised(tmp_path / "model.onnx"), **options)

    return cuts


def edges_of_blocks(cuts: Cuts) -> list[str]:
    """Boundaries at which the blocks begin and end."""
    places = range(cuts.first - 1, cuts.first + cuts.period * cuts.count, cuts.period)
    return [cuts.boundaries[place] for place in places]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_for_each_layer_of_every_architecture(name: str, architecture: Callable[[str], Path]) -> None:
    cuts = find_cuts(load_normalised(architecture(name)))
    assert cuts.count == (4 if name == "gptneo" else 3)


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_a_block_for_each_layer(layers: int, cuts_of: Callable[..., Cuts]) -> None:
    assert cuts_of(encoder(layers).model()).count == layers


def test_names_do_not_matter(cuts_of: Callable[..., Cuts]) -> None:
    plain, other = cuts_of(encoder().model()), cuts_of(renamed(encoder().model()))
    assert (plain.first, plain.period, plain.count) == (other.first, other.period, other.count)
    assert plain.segment_bytes == other.segment_bytes


@pytest.mark.parametrize("change", [reordered, backwards])
def test_the_order_of_the_nodes_does_not_matter(
    change: Callable[[ModelProto], ModelProto], cuts_of: Callable[..., Cuts]
) -> None:
    assert edges_of_blocks(cuts_of(change(encoder().model()))) == edges_of_blocks(cuts_of(encoder().model()))


def test_alternating_layers_are_one_block(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for number in range(6):
        x = builder.layer(x)
        if number % 2:
            x = builder.op("Add", x, builder.op("MatMul", builder.norm(x), builder.weight(WIDTH, WIDTH)))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 3


def test_layers_that_share_their_weights_are_blocks(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    shared = builder.weight(WIDTH, 2 * WIDTH)
    for _ in range(4):
        x = builder.op("Add", x, builder.feed_forward(x, shared))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 4


def test_hidden_states_as_outputs_do_not_end_the_search(cuts_of: Callable[..., Cuts]) -> None:
    cuts = cuts_of(with_hidden_states(4).model())
    assert (cuts.count, cuts.output) == (4, "last")


def test_tables_read_inside_the_layers_are_no_activation(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    positions = builder.input("positions", ["batch", "length"])
    for _ in range(4):
        x = builder.layer(builder.op("Add", x, builder.embed(positions, rows=64)))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 4


def test_the_first_activation_may_be_read_by_every_layer(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = first = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for _ in range(6):
        x = builder.layer(builder.op("Add", x, first))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count >= 5


def test_an_integer_that_the_first_activation_makes_is_shared(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    largest = builder.op("ArgMax", x, axis=-1)
    for _ in range(3):
        x = builder.layer(builder.op("Add", x, builder.op("Cast", largest, to=TensorProto.FLOAT)))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 3


def test_fused_layers_of_a_decoder_are_found(cuts_of: Callable[..., Cuts]) -> None:
    assert cuts_of(grouped_decoder(4).model()).count == 4


def test_the_layers_of_a_decoder_are_found_behind_its_encoder(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    states = builder.embed(builder.input("source_ids", ["batch", "source"]))
    for _ in range(2):
        states = builder.layer(states)
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for _ in range(5):
        x = builder.layer(x)
        query, key = (builder.op("MatMul", side, builder.weight(WIDTH, WIDTH)) for side in (x, states))
        scores = builder.op("Softmax", builder.op("MatMul", query, builder.op("Transpose", key, perm=[0, 2, 1])))
        x = builder.op("Add", x, builder.op("MatMul", scores, states))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 5


def test_a_float_input_can_be_the_source(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.input("inputs_embeds", ["batch", "length", WIDTH], TensorProto.FLOAT)
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    assert cuts_of(builder.model()).count == 3


def unrepeated() -> ModelProto:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    x = builder.op("Relu", builder.op("MatMul", x, builder.weight(WIDTH, 2 * WIDTH)))
    builder.output(builder.op("MatMul", x, builder.weight(2 * WIDTH, WIDTH)), "hidden", ["batch", "length", WIDTH])
    return builder.model()


def test_nothing_repeated_is_refused_with_the_reason(cuts_of: Callable[..., Cuts]) -> None:
    with pytest.raises(ExportError, match=r"no repeating blocks.*the longest run of equal structure.*is 1.*--whole"):
        cuts_of(unrepeated())


def test_nothing_repeated_can_stay_whole(cuts_of: Callable[..., Cuts]) -> None:
    assert cuts_of(unrepeated(), whole=True).count == 0


def test_a_graph_without_weights_is_refused(cuts_of: Callable[..., Cuts]) -> None:
    builder = Builder()
    x = builder.input("x", ["n", 4], TensorProto.FLOAT)
    builder.output(builder.op("Relu", x), "y", ["n", 4])
    with pytest.raises(ExportError, match="weight matrix"):
        cuts_of(builder.model())
