"""Arguments that cannot be used are refused, and all their faults are named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    assert_close,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    load,
)

import pipeload


def test_all_faults_of_the_inputs_are_named_at_once(toy: Path) -> None:
    wrong: dict[str, Any] = {
        "input_ids": toys.inputs()["input_ids"].astype(np.int32),
        "token_type_ids": np.zeros((2, 5), np.int64),
        "position": [1, 2, 3],
    }
    with load(toy) as model:
        with pytest.raises(pipeload.ConfigError) as caught:
            model.run(wrong)
        for words in (
            "'attention_mask' is missing",
            "'input_ids' has dtype int32, the model takes int64",
            "'token_type_ids' is no input",
            "'position' is a list, not a NumPy array",
            "It takes input_ids: int64",
        ):
            assert words in str(caught.value)


def test_faults_of_shape_are_named_with_those_of_dtype(toy: Path) -> None:
    wrong = {"input_ids": np.zeros((2, 5, 1), np.int64), "attention_mask": np.zeros((2, 5), np.float32)}
    with load(toy) as model, pytest.raises(pipeload.ConfigError) as caught:
        model.run(wrong)
    assert "'input_ids' has 3 dimensions" in str(caught.value)
    assert "'attention_mask' has dtype float32" in str(caught.value)


def test_shapes_that_contradict_each_other_are_named(toy: Path) -> None:
    with load(toy) as model, pytest.raises(pipeload.ConfigError, match="'attention_mask' has size 6"):
        model.run(toys.inputs(2, 5) | {"attention_mask": np.ones((2, 6), np.int64)})


@pytest.mark.parametrize("index", [toys.VOCABULARY, -toys.VOCABULARY - 1, 2**62])
def test_a_token_beyond_the_table_is_named(toy: Path, index: int) -> None:
    with load(toy, smallest_budget(toy)) as model:
        inputs = toys.inputs()
        inputs["input_ids"][1, 2] = index
        with pytest.raises(pipeload.ConfigError, match=f"'input_ids' is out of range: {index} is no row"):
            model.run(inputs)
        model.run(toys.inputs())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loaders": 0}, "loaders is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"sizes": {"width": 3}}, r"no dimension \['width'\]"),
        ({"sizes": {"batch_size": -1}}, "batch_size"),
        ({"sizes": {"batch_size": "many"}}, "batch_size"),
        ({"memory_budget": "much"}, "'much' is no size"),
        ({"memory_budget": 0}, "is positive"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_named(toy: Path, options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(pipeload.ConfigError, match=words):
        pipeload.load(toy, **options)


def test_a_directory_without_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(pipeload.ManifestError, match="is not a sharded model directory"):
        pipeload.load(tmp_path)


def test_a_path_may_be_a_text(toy: Path) -> None:
    with pipeload.load(str(toy), "auto") as model:
        assert_close(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=1), 1e-5)
