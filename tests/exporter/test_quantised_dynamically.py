"""Graphs that quantise a whole tensor with one scale answer for each text as if it were the only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.exporter.graphs import WIDTH, encoder

import pipeload
from pipeload_export import export

NEW_TOKENS = 16


def quantised(source: Path, folder: Path) -> Path:
    """The same graph with dynamically quantised products."""
    from onnxruntime.quantization import quantize_dynamic

    folder.mkdir()
    quantize_dynamic(source, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def unsplit(architecture: Callable[[str], Path], tmp_path: Path) -> Path:
    return quantised(architecture("llama"), tmp_path / "quantised")


@pytest.fixture
def model(unsplit: Path, tmp_path: Path) -> Iterator[pipeload.Model]:
    # Without the comparison: rounding in another order moves values to the next step of their scale.
    export(unsplit, tmp_path / "target", task="text-generation-with-past", verify=False)
    with pytest.warns(pipeload.QuantisationWarning, match="one scale for a whole tensor"):
        model = pipeload.load(tmp_path / "target")
    with model:
        yield model


def greedy(session: ort.InferenceSession, prompt: list[int]) -> list[int]:
    """The text of one prompt, by onnxruntime from the unsplit graph."""
    caches = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past")}
    pasts: dict[str, Any] = {name: np.zeros((1, s[1], 0, s[3]), np.float32) for name, s in caches.items()}
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    ids, made, length = np.array([prompt]), list[int](), 0
    for _ in range(NEW_TOKENS):
        total = length + ids.shape[1]
        free = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(length, total)[None],
        }
        inputs = {name: array for name, array in free.items() if name in taken} | pasts
        outputs = dict(zip(names, session.run(names, inputs), strict=True))
        pasts = {name: outputs[name.replace("past_key_values", "present")] for name in pasts}
        made.append(int(outputs["logits"][0, -1].argmax()))
        ids, length = np.array([made[-1:]]), total
    return made


@pytest.mark.slow
def test_texts_are_those_of_the_unsplit_graph(model: pipeload.Model, unsplit: Path) -> None:
    assert model.manifest.quantised_dynamically
    random = np.random.default_rng(0)
    # One is longer than the pieces in which other models take a prompt.
    prompts = [random.integers(0, 1000, length).tolist() for length in (5, 300, 40)]
    session = ort.InferenceSession(str(unsplit), providers=["CPUExecutionProvider"])
    wanted = [greedy(session, prompt) for prompt in prompts]
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": []}
    together = model.generate(prompts, **options)  # type: ignore[call-overload]
    assert [list(one.token_ids) for one in together] == wanted
    drafted = model.generate(prompts[2], prompt_lookup_num_tokens=5, **options)  # type: ignore[arg-type]
    assert (list(drafted.token_ids), drafted.drafted_tokens) == (wanted[2], 0)
    with model.session() as session_:
        for count in (20, 40):
            text = session_.generate(prompts[2][:count], **options)  # type: ignore[arg-type]
        assert list(text.token_ids) == wanted[2]


def test_items_are_not_joined(tmp_path: Path) -> None:
    encoder().save(tmp_path / "model.onnx")
    path = quantised(tmp_path / "model.onnx", tmp_path / "quantised")
    assert any(node.op_type == "DynamicQuantizeLinear" for node in onnx.load(path).graph.node)
    export(path, tmp_path / "target", task="feature-extraction", verify=False)
    random = np.random.default_rng(0)
    items = [
        {"input_ids": random.integers(0, 1000, (1, 6)), "attention_mask": np.ones((1, 6), np.int64)} for _ in range(4)
    ]
    with pytest.warns(pipeload.QuantisationWarning):
        model = pipeload.load(tmp_path / "target")
    with model:
        alone = [model.run(item)["hidden"] for item in items]
        together = [outputs["hidden"] for outputs in model.run_many(items, batch=4)]
    assert all(array.shape == (1, 6, WIDTH) for array in together)
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
