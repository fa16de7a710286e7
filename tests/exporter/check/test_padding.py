"""Padding on the left is tried: texts share a batch only where it changes no answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from tests.exporter.conftest import Sharded
from tests.exporter.graphs import ROWS, WIDTH, Builder, encoder, grouped_decoder
from tests.models import traced_here

import pipeload
from pipeload.notify import silent
from pipeload_export import export
from pipeload_export.check import chain
from pipeload_export.check.padding import takes_left_padding
from pipeload_export.graph.runtime import open_session

SMALL = {
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
GEMMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000},
    "Gemma": GEMMA,
    "Gemma2": {**GEMMA, "sliding_window": 16},
    "Gemma3Text": {**GEMMA, "sliding_window": 16},
    "Mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 1000, "max_seq_len": 128},
    "Nemotron": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128},
}
"""Decoders that optimum exports without `position_ids`."""
PROMPTS = ([3, 141, 59, 26, 535], [897], [93, 238, 46, 264, 338, 327, 95, 28])


def by_distance(builder: Builder, mask: str, ids: str) -> str | None:
    """No positions at all: attention sees only which tokens there are."""
    return None


def by_mask(builder: Builder, mask: str, ids: str) -> str:
    """Tokens before each one of the text, padding not counted."""
    return builder.op("Sub", builder.op("CumSum", mask, builder.constant(1)), mask)


def by_column(builder: Builder, mask: str, ids: str) -> str:
    """Columns before each one of the text, padding counted."""
    ones = builder.op("Expand", builder.constant(1), builder.op("Shape", mask))
    return builder.op("Sub", builder.op("CumSum", ones, builder.constant(1)), ones)


def decoder(positions: Callable[[Builder, str, str], str | None]) -> Builder:
    """A decoder of tokens whose positions come from the graph itself."""
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    mask = builder.input("attention_mask", ["batch", "past + length"])
    bias = builder.mask_bias(mask)
    x = builder.embed(ids)
    if places := positions(builder, mask, ids):
        new = builder.op("Neg", builder.op("Shape", ids, start=1, end=2))
        last = builder.op("Slice", places, new, builder.constant([2**31 - 1]), builder.constant([1]))
        x = builder.op("Add", x, builder.embed(last))
    for number in range(3):
        past = builder.input(f"past.{number}", ["batch", "past", WIDTH], TensorProto.FLOAT)
        update, present = builder.attention(x, bias=bias, past=past)
        x = builder.op("Add", x, update)
        x = builder.op("Add", x, builder.feed_forward(x))
        builder.output(present, f"present.{number}", ["batch", "past + length", WIDTH])
    logits = builder.op("MatMul", builder.norm(x), builder.weight(WIDTH, ROWS))
    builder.output(logits, "logits", ["batch", "length", ROWS])
    return builder


@pytest.mark.parametrize(("positions", "wanted"), [(by_distance, True), (by_mask, True), (by_column, False)])
def test_positions_of_the_graph_are_tried(
    positions: Callable[[Builder, str, str], str | None], wanted: bool, shard: Callable[..., Sharded]
) -> None:
    sharded = shard(decoder(positions).model())
    assert len(sharded.manifest.caches) == 3
    assert takes_left_padding(sharded.directory, sharded.manifest, silent) is wanted


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_one_shard_of_each_kind_is_opened(
    name: str, sharded_architecture: Callable[[str], Sharded], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = sharded_architecture(name)
    opened: list[str] = []
    monkeypatch.setattr(chain, "open_session", lambda path, what: opened.append(path.stem) or open_session(path, what))
    assert takes_left_padding(sharded.directory, sharded.manifest, silent)
    blocks = {item.name for item in sharded.manifest.shards if item.role == "block"}
    assert len(blocks) == 3
    assert set(opened) & blocks == {"block.000"}
    kinds = {item.name: item.structure for item in sharded.manifest.shards}
    assert {kinds[name] for name in opened} == set(kinds.values())


def test_blocks_of_one_graph_with_other_masks_are_tried_too(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    ids, mask = (builder.input(name, ["batch", "length"]) for name in ("input_ids", "attention_mask"))
    ones = builder.op("Expand", builder.constant(1), builder.op("Shape", mask))
    hides, shows = builder.mask_bias(mask), builder.mask_bias(ones)
    x = builder.embed(ids)
    for number in range(4):
        x = builder.layer(x, bias=shows if number % 2 else hides)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    blocks = [item for item in sharded.manifest.shards if item.role == "block"]
    assert len(blocks) == 4
    assert len({item.structure for item in blocks}) == 1
    assert takes_left_padding(sharded.directory, sharded.manifest, silent) is False


def fused_encoder(*, lengths: bool) -> Builder:
    """An encoder as onnxruntime's optimiser writes it, whose attention takes lengths of texts, or the mask itself."""
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    mask = builder.op("Cast", builder.input("attention_mask", ["batch", "length"]), to=TensorProto.INT32)
    if lengths:
        mask = builder.op("ReduceSum", mask, builder.constant([1]), keepdims=0)
    x = builder.embed(ids)
    for number in range(3):
        weights = [builder.norm(x), builder.weight(WIDTH, 3 * WIDTH), builder.weight(3 * WIDTH), mask]
        attention = helper.make_node("Attention", weights, [f"mixed.{number}"], domain="com.microsoft", num_heads=2)
        builder.nodes.append(attention)
        x = builder.op("Add", x, f"mixed.{number}")
        x = builder.op("Add", x, builder.feed_forward(x))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    return builder


@pytest.mark.parametrize(
    ("builder", "wanted"),
    [
        (encoder(), True),
        (fused_encoder(lengths=False), True),
        (fused_encoder(lengths=True), False),
        (grouped_decoder(), False),
    ],
    ids=["mask", "fused-mask", "lengths", "grouped"],
)
def test_kernels_that_count_tokens_are_tried(builder: Builder, wanted: bool, shard: Callable[..., Sharded]) -> None:
    sharded = shard(builder.model())
    assert takes_left_padding(sharded.directory, sharded.manifest, silent) is wanted


@pytest.mark.parametrize("moment", ["session", "run"])
def test_a_machine_without_memory_says_nothing_about_padding(
    shard: Callable[..., Sharded], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    sharded = shard(encoder().model())

    def fails(*_: object, **__: object) -> None:
        raise RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for 9 GB")

    monkeypatch.setattr(*((ort, "InferenceSession", fails) if moment == "session" else (chain, "run", fails)))
    with pytest.raises(MemoryError, match="Failed to allocate memory for 9 GB"):
        takes_left_padding(sharded.directory, sharded.manifest, silent)


def test_models_without_a_mask_are_not_tried(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    assert takes_left_padding(sharded.directory, sharded.manifest, silent) is None


@pytest.mark.parametrize("positions", [by_mask, by_column])
def test_a_batch_has_the_texts_of_its_prompts(
    positions: Callable[[Builder, str, str], str | None], tmp_path: Path
) -> None:
    source = decoder(positions).save(tmp_path / "model.onnx")
    manifest = export(source, tmp_path / "target", task="text-generation-with-past")
    assert manifest.takes_left_padding is (positions is by_mask)
    prompts = [[token % ROWS for token in prompt] for prompt in PROMPTS]
    with pipeload.load(tmp_path / "target") as model:
        alone = [model.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
        together = [one.token_ids for one in model.generate(prompts, max_new_tokens=8)]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_batches_of_families_have_the_texts_of_transformers(family: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], initializer_range=0.2, pad_token_id=0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path / "checkpoint")
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16)
        wanted.append(tuple(made[0, len(prompt) :].tolist()))
    with warnings.catch_warnings(), traced_here():
        warnings.simplefilter("ignore")
        manifest = export(tmp_path / "checkpoint", tmp_path / "target", task="text-generation")
    assert "position_ids" not in {spec.name for spec in manifest.inputs}
    assert manifest.takes_left_padding
    with pipeload.load(tmp_path / "target") as model:
        found = model.generate([list(p) for p in PROMPTS], max_new_tokens=16, min_new_tokens=16)
    assert [one.token_ids for one in found] == wanted
    assert np.unique(wanted).size > 3
