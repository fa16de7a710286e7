"""Tasks of models: the names of the Hugging Face hub, and how to tell from a config or a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeload.errors import ConfigError

__all__ = ["TASKS", "check_task", "is_encoder_alone", "is_projected", "task_of_config", "task_of_graph"]

TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
}
"""Task -> the class of transformers that loads a checkpoint for it."""

_SYNONYMS = {
    "default": "feature-extraction",
    "image-feature-extraction": "feature-extraction",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "ner": "token-classification",
    "sentence-similarity": "feature-extraction",
    "sentence-transformers": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "sequence-classification": "text-classification",
    "text-embedding": "feature-extraction",
    "text-ranking": "text-classification",
    "zero-shot-classification": "text-classification",
}
"""Other names that the hub, transformers and optimum have for models of these tasks, which are only used otherwise."""

_ARCHITECTURES: dict[str, str | None] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ModelWithProjection": "feature-extraction",
    **dict.fromkeys(("MTModel", "DoubleHeadsModel", "EncoderDecoderModel")),
    "Model": "feature-extraction",
}
"""End of an architecture's name -> task, None for heads without one. `Model` comes last: others end with it as well."""

_OF_ENCODER_DECODERS = frozenset({"decoder_input_ids", "encoder_hidden_states"})
"""Inputs of an encoder with its decoder, or of such a decoder alone."""


def check_task(task: str) -> str:
    """The task as the manifest calls it, for a synonym too.

    `text-generation-with-past` is `text-generation`, which always has a cache.

    Raises:
        ConfigError: it is none of `TASKS`.
    """
    name = task.removesuffix("-with-past")
    name = _SYNONYMS.get(name, name)
    if name not in TASKS:
        raise ConfigError(f"'{task}' is no task that pipeload knows. Choose one of: {', '.join(TASKS)}.")
    return name


def task_of_config(config: Mapping[str, Any]) -> str | None:
    """The task that the config's architecture was made for, or None if it does not tell."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list):
        return None
    for architecture in architectures:
        for ending, task in _ARCHITECTURES.items():
            if isinstance(architecture, str) and architecture.endswith(ending):
                return task
    return None


def is_encoder_alone(architecture: str) -> bool:
    """Whether it is the encoder of a model that has a decoder, too, such as T5EncoderModel: for feature-extraction."""
    return architecture.endswith("EncoderModel")


def is_projected(architecture: str) -> bool:
    """Whether it is a tower and the projection behind it, as CLIPVisionModelWithProjection: for feature-extraction."""
    return architecture.endswith("ModelWithProjection")


def task_of_graph(inputs: Sequence[str], outputs: Mapping[str, Sequence[int | str]], config: Mapping[str, Any]) -> str:
    """The task of an ONNX graph.

    The graph has the last word where it is clear, because the config beside it describes the checkpoint that
    the graph was made from, which may have had another head.

    Args:
        inputs: names of the graph's inputs.
        outputs: name of each output -> its shape.
        config: the content of `config.json`; may be empty.
    """
    if "start_logits" in outputs and "end_logits" in outputs:
        return "question-answering"
    if "logits" not in outputs:
        return "feature-extraction"
    if len(outputs["logits"]) == 3 and not _OF_ENCODER_DECODERS.isdisjoint(inputs):
        # Its logits are of words to come, for which pipeload has no task: `run` answers.
        return "feature-extraction"
    if any("past" in name for name in inputs):
        return "text-generation"
    found = task_of_config(config)
    if found not in (None, "feature-extraction"):
        return found
    shape = outputs["logits"]
    if len(shape) == 2:
        return "image-classification" if "pixel_values" in inputs else "text-classification"
    return "fill-mask" if shape and shape[-1] == config.get("vocab_size") else "token-classification"
