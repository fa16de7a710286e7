"""Names of tasks."""

from __future__ import annotations

import pytest

from pipeload.errors import ConfigError
from pipeload_export.source.task import TASKS, check_task, task_of_config


@pytest.mark.parametrize("task", TASKS)
def test_a_task_keeps_its_name(task: str) -> None:
    assert check_task(task) == task


@pytest.mark.parametrize(
    ("synonym", "task"),
    [
        ("zero-shot-classification", "text-classification"),
        ("text-ranking", "text-classification"),
        ("sentiment-analysis", "text-classification"),
        ("sentence-similarity", "feature-extraction"),
        ("image-feature-extraction", "feature-extraction"),
        ("text-embedding", "feature-extraction"),
        ("ner", "token-classification"),
        ("text-generation-with-past", "text-generation"),
    ],
)
def test_a_synonym_is_the_task_that_loads_such_models(synonym: str, task: str) -> None:
    """The hub's tag of a model was refused, though the model is of a known task."""
    assert check_task(synonym) == task


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'translation' is no task that pipeload knows\. Choose one of: feature-ex"):
        check_task("translation")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("CLIPVisionModelWithProjection", "feature-extraction"),
        ("GPT2LMHeadModel", "text-generation"),
        ("MarianMTModel", None),
        ("GPT2DoubleHeadsModel", None),
        ("VisionEncoderDecoderModel", None),
    ],
)
def test_a_head_without_a_task_is_no_trunk(architecture: str, task: str | None) -> None:
    """MarianMTModel was exported as the model below its head, without a word."""
    assert task_of_config({"architectures": [architecture]}) == task
