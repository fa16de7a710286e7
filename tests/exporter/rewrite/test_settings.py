"""Inputs that are settings are fixed, and scalar inputs that are data travel as all others do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import ROWS, WIDTH, Builder, run
from tests.marks import slow

import pipeload
from pipeload_export import export


def decoder(*, keep: str | None, shape: tuple[int, ...] = ()) -> Builder:
    """A decoder that makes the logits of the last positions only, as many as its input `keep` says."""
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    bias = builder.mask_bias(builder.input("attention_mask", ["batch", "past + length"]))
    x = builder.embed(ids)
    for number in range(3):
        past = builder.input(f"past.{number}", ["batch", "past", WIDTH], TensorProto.FLOAT)
        update, present = builder.attention(x, bias=bias, past=past)
        x = builder.op("Add", x, update)
        x = builder.op("Add", x, builder.feed_forward(x))
        builder.output(present, f"present.{number}", ["batch", "past + length", WIDTH])
    x = builder.norm(x)
    if keep:
        count = builder.op("Reshape", builder.input(keep, shape), builder.constant([1]))
        last = builder.constant([np.iinfo(np.int64).max])
        x = builder.op("Slice", x, builder.op("Neg", count), last, builder.constant([1]))
    builder.output(builder.op("MatMul", x, builder.weight(WIDTH, ROWS)), "logits", ["batch", "length", ROWS])
    return builder


@pytest.mark.parametrize(("keep", "shape"), [slow("num_logits_to_keep", ()), ("logits_to_keep", (1,))])
def test_a_decoder_that_can_leave_logits_out_generates(keep: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    texts = []
    for number, builder in enumerate((decoder(keep=None), decoder(keep=keep, shape=shape))):
        source = builder.save(tmp_path / f"{number}.onnx")
        manifest = export(source, tmp_path / f"{number}", task="text-generation-with-past")
        assert keep not in {spec.name for spec in manifest.inputs}
        assert manifest.head is not None
        with pipeload.load(tmp_path / f"{number}") as model:
            found = model.generate([[5, 6, 7], [8]], max_new_tokens=6)
            texts.append([one.token_ids for one in found])
    assert texts[0] == texts[1]


def test_scalar_inputs_are_passed_on(shard: Callable[..., Sharded], tmp_path: Path) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    gain = builder.input("gain", [], TensorProto.FLOAT)
    step = builder.op("Cast", builder.input("step", []), to=TensorProto.FLOAT)
    for _ in range(3):
        x = builder.layer(builder.op("Mul", x, gain))
    builder.output(builder.op("Add", x, step), "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    inputs = {"input_ids": np.arange(6).reshape(2, 3), "gain": np.array(1.5, np.float32), "step": np.array(3)}
    wanted = run(sharded.unsplit, inputs)
    with pipeload.load(sharded.directory) as model:
        assert_same_answers(wanted, model.run(inputs))
    export(sharded.unsplit, tmp_path / "verified", task="feature-extraction")
