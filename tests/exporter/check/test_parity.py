"""Every checkpoint's streamed model is held against transformers' own, beyond every length where that changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.marks import slow
from tests.models import seeded, traced_here

import pipeload
from pipeload.errors import ConfigError, ExportError, ShardError
from pipeload.format.manifest import Manifest, read
from pipeload_export import export, verify
from pipeload_export.check.boundaries import boundaries
from pipeload_export.source import asking, tracer
from pipeload_export.source.asking import visible

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SMALL = {**_SIZES, "vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.3}
_DECODER = {**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
_LONG = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [1.5 + n for n in range(8)]}
_LONGROPE = {**_DECODER, "original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope", **_LONG}}
_SOFTCAP = {**_DECODER, "head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 2.0}

_TOWER = {**_SIZES, "projection_dim": 24, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 200}

# name -> (class of transformers, class of its config, the config's arguments)
CHECKPOINTS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _SMALL),
    "clip-projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _TOWER),
    "bigbird": ("BigBirdModel", "BigBirdConfig", {**_SMALL, "block_size": 4, "num_random_blocks": 1}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _SOFTCAP),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-dynamic": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "phi3-longrope": ("Phi3ForCausalLM", "Phi3Config", _LONGROPE),
    "mt5-encoder": ("MT5EncoderModel", "MT5Config", _T5),
    "t5-encoder": ("T5EncoderModel", "T5Config", _T5),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_SMALL, "max_position_embeddings": 50}),
}


def write_checkpoint(folder: Path, name: str, seed: int = 0) -> Path:
    pytest.importorskip("transformers")
    seeded(*CHECKPOINTS[name], seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        return root / name if (root / name).exists() else write_checkpoint(root / name, name)

    return get


def exported(source: Path, target: Path) -> Manifest:
    with traced_here():
        return export(source, target)


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("bert", 64),
        ("t5-encoder", 300),
        slow("mt5-encoder", 300),
        slow("llama-dynamic", 300),
        slow("phi3-longrope", 300),
        slow("roberta", 48),
        slow("gemma2", 300),
        slow("llama", 300),
    ],
)
def test_the_streamed_model_answers_as_its_source(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, longest: int
) -> None:
    exported(checkpoint(name), tmp_path / "target")
    found = read(tmp_path / "target").parity
    assert found is not None
    assert found.longest == longest, "as far as the source itself goes"
    assert found.beyond == ()
    assert {case.rpartition(" ")[2] for case in found.cases} >= {"left", "right"}
    assert all(output.max_rel_error < 1e-5 and output.limit == 1e-4 for output in found.outputs)
    assert found.tokens_equal == found.tokens
    assert bool(found.tokens) == ("CausalLM" in CHECKPOINTS[name][0])
    assert {"torch", "transformers", "pipeload"} == set(found.versions)


def test_a_tower_keeps_the_projection_that_its_class_has(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """AutoModel has the tower alone for the same config, and the projection was dropped without a word."""
    found = exported(checkpoint("clip-projection"), tmp_path / "target")
    assert found.task == "feature-extraction"
    assert found.parity is not None
    assert {output.output for output in found.parity.outputs} == {"image_embeds", "last_hidden_state"}
    assert {spec.name: spec.shape[-1] for spec in found.free_outputs}["image_embeds"] == 24


@pytest.mark.slow
def test_children_trace_and_answer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pipeload_export import export\n"
        "print(export(sys.argv[1], sys.argv[2]).parity.longest, 'torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(checkpoint("bert")), str(tmp_path / "target")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("64 False\n", "")


def refusal(source: Path, target: Path) -> str:
    with pytest.raises(ExportError) as caught:
        exported(source, target)
    assert not [path for path in target.parent.iterdir() if path.name.startswith((".", target.name))], "undone"
    return str(caught.value)


def test_a_length_from_which_the_answers_differ_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    said = refusal(checkpoint("bigbird"), tmp_path / "target")
    assert "Output 'last_hidden_state' differs for 1 x 29 from token" in said
    assert "equal up to 28 tokens; by config.json (5 + 2 num_random_blocks) block_size = 28. Nothing" in said
    assert said.endswith("Use another model, or an .onnx file of your own; --no-verify exports it with these answers.")
    with traced_here():
        assert export(checkpoint("bigbird"), tmp_path / "target", verify=False).parity is None


@pytest.mark.parametrize(
    ("name", "fault", "begins"),
    [
        ("llama", "theta", "for 1 x 7 from token 1 on"),
        slow("phi3-longrope", "branch", "for 1 x 17 from token"),
        slow("llama-dynamic", "branch", "for 1 x 21 from token"),
        slow("gemma2", "softcap", "for 1 x 7 from token 1 on"),
    ],
)
def test_a_planted_fault_of_the_trace_is_found(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: str,
    begins: str,
) -> None:
    load = tracer.load_model

    def with_other_theta(*arguments: Any) -> Any:
        model = load(*arguments)
        rope = model.model.rotary_emb
        model.config.rope_theta *= 10
        rope.inv_freq = rope.rope_init_fn(model.config, None)[0]
        return model

    def with_another_attention(*arguments: Any) -> Any:
        model = load(*arguments)
        model.set_attn_implementation("sdpa")
        return model

    if fault == "branch":
        monkeypatch.setattr(tracer, "follow_lengths", lambda _: None)
    else:
        monkeypatch.setattr(tracer, "load_model", with_other_theta if fault == "theta" else with_another_attention)
    assert begins in refusal(checkpoint(name), tmp_path / "target")


@pytest.mark.slow
def test_a_cache_that_goes_wrong_is_found(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = pipeload.Model.step

    def forgets(self: Any, inputs: Any, state: Any) -> Any:
        logits = step(self, inputs, state)
        if state.length == 10:
            for value in state.caches.values():
                value.update_inplace(np.zeros_like(value.numpy()))
        return logits

    monkeypatch.setattr(pipeload.Model, "step", forgets)
    assert "for 32 tokens after 2 x 6 from token 11 on" in refusal(checkpoint("llama"), tmp_path / "target")


@pytest.mark.slow
def test_verify_compares_with_a_source_later(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = exported(checkpoint("llama"), tmp_path / "target")
    other = write_checkpoint(tmp_path / "other", "llama", seed=1)
    with traced_here():
        assert verify(tmp_path / "target", source=checkpoint("llama")).parity == manifest.parity
        said = r"not answer as its source does.*1 x 1 .*different from the first on\. Export it from this source again"
        with pytest.raises(ExportError, match=said):
            verify(tmp_path / "target", source=other)
    assert any("--source" in skipped for skipped in verify(tmp_path / "target").skipped)
    (tmp_path / "model.onnx").touch()
    with pytest.raises((ConfigError, ExportError), match="onnx"):
        verify(tmp_path / "target", source=tmp_path / "model.onnx")


def test_what_the_engine_cannot_run_is_not_exported(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> Any:
        raise ShardError("'block.000' is damaged.")

    monkeypatch.setattr(pipeload, "load", load)
    said = refusal(checkpoint("bert"), tmp_path / "target")
    assert said == "The engine cannot run what was exported: 'block.000' is damaged."


def test_a_small_machine_streams(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, budgets = pipeload.load, []

    def with_little_memory(directory: Path, budget: int | str = 1 << 20, **options: Any) -> Any:
        budgets.append(budget)
        return load(directory, budget, **options)

    monkeypatch.setattr(pipeload, "load", with_little_memory)
    assert (found := exported(checkpoint("bert"), tmp_path / "target").parity) is not None
    assert found.longest == 64
    assert len(budgets) == 2, "the second is the smallest that works"


def test_too_little_memory_for_the_source_is_said(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "auto_budget_bytes", lambda: 1 << 20)
    assert "takes about" in (said := refusal(checkpoint("bert"), tmp_path / "target"))
    assert "--no-verify" in said


def test_an_input_that_the_source_itself_refuses_is_left_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    found = exported(checkpoint("bert"), tmp_path / "target").parity
    assert found is not None
    assert "1 x 64" in found.cases
    assert "1 x 65" not in found.cases, "BERT has no position 65"


def test_boundaries_are_the_lengths_in_the_config() -> None:
    config = {
        "hidden_size": 999,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "use_sliding_window": True,
        "attention_window": [32, 64],
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, "factor": 32.0},
        "position_buckets": -1,
        "position_embedding_type": "absolute",
    }
    assert boundaries(config) == {
        32: "attention_window",
        64: "attention_window",
        4096: "rope_scaling.original_max_position_embeddings",
        131072: "max_position_embeddings",
    }
    assert boundaries({"block_size": 64, "num_random_blocks": 3}).keys() == {64, 704}


def test_padding_is_not_compared_and_a_vocabulary_in_part() -> None:
    logits = np.arange(2 * 3 * 20000, dtype=np.float32).reshape(2, 3, 20000)
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    assert visible(logits, mask).shape == (5, 6667)
    assert visible(logits[..., 0], None).shape == (2, 3)
    assert visible(logits[:, 0], mask).shape == (2, 20000), "an output of a text, not of its tokens"
