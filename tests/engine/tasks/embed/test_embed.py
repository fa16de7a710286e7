from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import TEXT_INPUTS, Array, ToyRunner, manifest, write_bert_tokenizer, write_json

from pipeload.errors import BudgetError, ConfigError, ShardError
from pipeload.tasks.embed.embed import embed

pytest.importorskip("tokenizers")

HIDDEN = 4
TEXTS = ["the cat", "dog", "the cat sat on the mat", "nice dogs"]
TABLE = np.random.default_rng(0).standard_normal((30, HIDDEN)).astype(np.float32)


def _hidden(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"last_hidden_state": TABLE[inputs["input_ids"]]}


def _runner(directory: Path, **settings: object) -> ToyRunner:
    write_bert_tokenizer(directory, **settings)
    shape = {"last_hidden_state": ("batch_size", "sequence_length", HIDDEN)}
    return ToyRunner(directory, manifest("feature-extraction", outputs=shape), _hidden)


def _write_modules(directory: Path, *names: str, **pooling: object) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    write_json(directory, "modules.json", modules)
    write_json(directory, "1_Pooling/config.json", pooling)


def _mean(runner: ToyRunner, text: str) -> Array:
    from pipeload.tasks.text.tokenizer import tokenizer_of

    mean: Array = TABLE[list(tokenizer_of(runner).encode(text).ids)].mean(axis=0)
    return mean


def test_vectors_are_means_in_the_order_of_the_texts(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    vectors = embed(runner, TEXTS, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [_mean(runner, text) for text in TEXTS], rtol=1e-5)


def test_longer_texts_run_together(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    embed(runner, TEXTS, batch_size=2)
    assert [call["input_ids"].shape for call in runner.calls] == [(2, 8), (2, 4)]
    assert set(runner.calls[0]) == set(TEXT_INPUTS)


def test_many_texts_are_tokenised_a_window_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = embed(_runner(tmp_path), TEXTS)
    monkeypatch.setattr("pipeload.tasks.text.batches.WINDOW", 3)
    runner = _runner(tmp_path)
    np.testing.assert_array_equal(embed(runner, TEXTS), expected)


def test_a_single_text_is_a_single_vector(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    np.testing.assert_array_equal(embed(runner, "dog"), embed(runner, ["dog"])[0])


def test_no_texts_are_no_vectors(tmp_path: Path) -> None:
    assert embed(_runner(tmp_path), []).shape == (0, HIDDEN)


def test_batches_shrink_to_what_the_budget_holds(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    expected = embed(runner, TEXTS)
    runner.largest_batch = 1
    np.testing.assert_allclose(embed(runner, TEXTS), expected, rtol=1e-5)
    runner.largest_batch = 0
    with pytest.raises(BudgetError):
        embed(runner, TEXTS)


def test_the_modules_of_sentence_transformers_are_followed(tmp_path: Path) -> None:
    _write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode_max_tokens=True)
    runner = _runner(tmp_path)
    vector = embed(runner, "dog")
    largest = TABLE[[2, 7, 3]].max(axis=0)
    np.testing.assert_allclose(vector, largest / np.linalg.norm(largest), rtol=1e-5)


def test_several_poolings_stand_side_by_side(tmp_path: Path) -> None:
    _write_modules(tmp_path, "Transformer", "Pooling", pooling_mode_cls_token=True, pooling_mode_mean_tokens=True)
    runner = _runner(tmp_path)
    np.testing.assert_allclose(embed(runner, "dog"), [*TABLE[2], *_mean(runner, "dog")], rtol=1e-5)
    assert embed(runner, []).shape == (0, 2 * HIDDEN)


def test_texts_are_stripped_lowered_and_prompted_as_the_files_say(tmp_path: Path) -> None:
    write_json(tmp_path, "sentence_roberta_config.json", {"do_lower_case": True})
    prompts = {"prompts": {"query": "the ", "other": "on "}, "default_prompt_name": "query"}
    write_json(tmp_path, "config_sentence_transformers.json", prompts)
    runner = _runner(tmp_path)
    embed(runner, "  CAT ")
    assert runner.calls[0]["input_ids"].tolist() == [[2, 5, 6, 3]]


def test_a_graph_that_pools_is_left_to_it(tmp_path: Path) -> None:
    _write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode_max_tokens=True)
    runner = _runner(tmp_path)
    shape: dict[str, tuple[int | str, ...]] = {
        "token_embeddings": ("batch_size", "sequence_length", HIDDEN),
        "sentence_embedding": ("batch_size", HIDDEN),
    }
    runner.manifest = manifest("feature-extraction", outputs=shape)
    runner.function = lambda inputs: {"sentence_embedding": inputs["input_ids"][:, :2].astype(np.float16)}
    vectors = embed(runner, ["dog", "the cat"])
    assert vectors.tolist() == [[2, 7], [2, 5]]
    assert vectors.dtype == np.float32


def test_a_module_that_pipeload_lacks_is_refused(tmp_path: Path) -> None:
    _write_modules(tmp_path, "Transformer", "Pooling", "WordWeights")
    with pytest.raises(ConfigError, match="module 'WordWeights', which pipeload does not run"):
        embed(_runner(tmp_path), "dog")


def test_a_prompt_that_is_not_pooled_is_refused(tmp_path: Path) -> None:
    _write_modules(tmp_path, "Transformer", "Pooling", include_prompt=False)
    prompts = {"prompts": {"query": "the "}, "default_prompt_name": "query"}
    write_json(tmp_path, "config_sentence_transformers.json", prompts)
    with pytest.raises(ConfigError, match="leaves it out of the pooling"):
        embed(_runner(tmp_path), "dog")


def test_a_module_outside_the_directory_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path, "modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}])
    with pytest.raises(ShardError, match="leads out of the model directory"):
        embed(_runner(tmp_path), "dog")


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(TEXT_INPUTS, {"logits": (1, 2)}), (("pixel_values",), {"last_hidden_state": (1, 2, 3)})]
)
def test_a_model_that_makes_no_text_vectors_is_refused(
    tmp_path: Path, inputs: tuple[str, ...], outputs: dict[str, tuple[int | str, ...]]
) -> None:
    runner = ToyRunner(tmp_path, manifest("text-classification", inputs, outputs), _hidden)
    with pytest.raises(ConfigError, match=r"embed takes a text model.*--task feature-extraction"):
        embed(runner, "dog")


def test_a_model_of_images_is_not_told_to_be_exported_as_it_was(tmp_path: Path) -> None:
    shape: dict[str, tuple[int | str, ...]] = {"last_hidden_state": (1, 2, 3)}
    runner = ToyRunner(tmp_path, manifest("feature-extraction", ("pixel_values",), shape), _hidden)
    with pytest.raises(ConfigError, match=r"embed takes a text model.*Take its outputs from model\.run"):
        embed(runner, "dog")


@pytest.mark.parametrize("texts", [[3], ["dog", None], [["dog"]], None, 5, iter(["dog"]), {"a": 1}, {"dog"}, b"dog"])
def test_only_strings_are_texts(tmp_path: Path, texts: Any) -> None:
    with pytest.raises(ConfigError, match="must be a string"):
        embed(_runner(tmp_path), texts)


def test_a_prompt_stands_before_each_text(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "the ", "other": "on "}, "default_prompt_name": "query"}
    write_json(tmp_path, "config_sentence_transformers.json", prompts)
    runner = _runner(tmp_path)
    for given, text in (({}, "the dog"), ({"prompt": "in "}, "in dog"), ({"prompt": ""}, "dog")):
        np.testing.assert_array_equal(embed(runner, ["dog"], **given), embed(runner, [text], prompt=""))
    np.testing.assert_array_equal(embed(runner, "dog", prompt_name="other"), embed(runner, "on dog", prompt=""))


def test_vectors_are_cut_and_then_brought_to_length_1(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    whole = embed(runner, TEXTS)
    np.testing.assert_array_equal(embed(runner, TEXTS, truncate_dim=2), whole[:, :2])
    cut = whole[:, :3] / np.linalg.norm(whole[:, :3], axis=1, keepdims=True)
    np.testing.assert_allclose(embed(runner, TEXTS, truncate_dim=3, normalize=True), cut, rtol=1e-6)
    np.testing.assert_allclose(embed(runner, TEXTS[0], truncate_dim=3, normalize=True), cut[0], rtol=1e-6)
    assert embed(runner, [], truncate_dim=3).shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 5}, "must be a string, not int"),
        ({"prompt_name": "query"}, "no prompt with the name 'query'; it has 'other'"),
        ({"prompt": "a", "prompt_name": "other"}, "prompt and prompt_name are both given"),
        ({"truncate_dim": 0}, "truncate_dim must be at least 1"),
        ({"truncate_dim": "2"}, "truncate_dim must be a whole number"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_json(tmp_path, "config_sentence_transformers.json", {"prompts": {"other": "on "}})
    with pytest.raises(ConfigError, match=message):
        embed(_runner(tmp_path), "dog", **options)


@pytest.mark.real
def test_real_minilm_equals_what_sentence_transformers_does(minilm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModel.from_pretrained(minilm).eval()

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {"last_hidden_state": outputs.last_hidden_state.numpy()}

    runner = ToyRunner(minilm, manifest("feature-extraction", outputs={"last_hidden_state": ("b", "s", 384)}), run)
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Stock prices fell sharply."]
    vectors = embed(runner, texts, batch_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    for text, vector in zip(texts, vectors, strict=True):
        mean = run(tokenizer(text, return_tensors="np"))["last_hidden_state"][0].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    similarities = vectors @ vectors.T
    assert similarities[0, 1] > 0.6 > 0.2 > similarities[0, 2]
