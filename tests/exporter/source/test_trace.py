"""What optimum's tracing needs and does not get is made up for, or is the reason that is given."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeload.format.closeness import range_of
from pipeload_export.source.refused import Refused
from pipeload_export.source.trace import trace
from pipeload_export.source.tracer import load_model, seeded_model
from pipeload_export.source.tracing import Request, Seeded

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _model(name: str, config: str, **options: Any) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("optimum.exporters.onnx")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**_SMALL, **options)).eval()


def _trace(model: Any, folder: Path, task: str) -> None:
    model.config._name_or_path = str(folder.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace(model, folder, task=task, opset=None)


def test_a_model_of_images_needs_no_processor(tmp_path: Path) -> None:
    _trace(_model("Dinov2Model", "Dinov2Config", image_size=28), tmp_path / "onnx", "feature-extraction")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert not (tmp_path / "onnx" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("model_class", "config", "options", "task"),
    [
        (
            "NystromformerModel",
            "NystromformerConfig",
            {"vocab_size": 100, "segment_means_seq_len": 64, "num_landmarks": 8},
            "feature-extraction",
        ),
    ],
)
def test_trial_inputs_that_a_model_does_not_take_are_the_reason(
    model_class: str, config: str, options: dict[str, Any], task: str, tmp_path: Path
) -> None:
    model = _model(model_class, config, **options)
    model.config.use_cache = task.endswith("with-past")
    with pytest.raises(Refused, match=r"type '\w+'\. With the trial inputs .* fails: RuntimeError: .*\. Export the"):
        _trace(model, tmp_path / "onnx", task)


@pytest.mark.parametrize(
    ("model_class", "config", "options", "heads"),
    [
        ("FalconForCausalLM", "FalconConfig", {"num_kv_heads": 2, "new_decoder_architecture": True}, 4),
        ("FalconForCausalLM", "FalconConfig", {"multi_query": True}, 1),
        ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 2, "intermediate_size": 64}, 2),
        ("PhiForCausalLM", "PhiConfig", {"intermediate_size": 64}, 4),
    ],
)
def test_trial_caches_have_the_heads_of_the_model(
    model_class: str, config: str, options: dict[str, Any], heads: int, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    model = _model(model_class, config, vocab_size=100, **options)
    _trace(model, tmp_path / "onnx", "text-generation-with-past")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    caches = [value for value in graph.input if value.name.startswith("past_key_values")]
    assert {value.type.tensor_type.shape.dim[1].dim_value for value in caches} == {heads}


@pytest.mark.parametrize("named", ["BrandNewEncoderModel", 1])
def test_a_class_that_transformers_lacks_is_that_of_the_config(named: object, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    _model("BertModel", "BertConfig", vocab_size=100, intermediate_size=64).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    request = Request(name="BERT", task="feature-extraction", weight_bytes=0, folder=str(folder))
    assert type(load_model(request, tmp_path / "view")).__name__ == "BertModel"


@pytest.mark.parametrize("kind", ["checkpoint", "seeded"])
def test_falcon_with_alibi_answers_as_transformers_does_by_default(kind: str, tmp_path: Path) -> None:
    onnxruntime, torch = pytest.importorskip("onnxruntime"), pytest.importorskip("torch")
    # Six heads have slopes that are no powers of two, and bfloat16 has no odd numbers beyond 256.
    config = {**_SMALL, "num_attention_heads": 6, "hidden_size": 96, "vocab_size": 100}
    config |= {"alibi": True, "multi_query": False, "initializer_range": 0.2}
    seeded = Seeded(model_class="FalconForCausalLM", config_class="FalconConfig", config=config, seed=0)
    seeded_model(seeded).save_pretrained(tmp_path / "checkpoint")
    source = {"folder": str(tmp_path / "checkpoint")} if kind == "checkpoint" else {"seeded": seeded}
    model = load_model(Request(name="Falcon", task="text-generation", weight_bytes=0, **source), tmp_path / "view")
    model.config.use_cache = True
    _trace(model.eval(), tmp_path / "onnx", "text-generation-with-past")
    ids = torch.randint(0, 100, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    reference = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, use_cache=False).logits.numpy()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    caches = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values")]
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = session.run(["logits"], inputs | dict.fromkeys(caches, np.empty((2, 6, 0, 16), np.float32)))[0]
    assert np.abs(found - expected)[mask.numpy() == 1].max() < 1e-5 * range_of(expected, "float32")
