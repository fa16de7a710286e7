"""Sentence embeddings: one vector for each text, as sentence-transformers makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, RunError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import TensorSpec
from pipeload.tasks.arguments import check_positive, check_several
from pipeload.tasks.embed.modules import Module, Step, pooling_folder, steps
from pipeload.tasks.embed.pooling import normalized, pool
from pipeload.tasks.model_files import read_sentence, read_settings
from pipeload.tasks.runner import Array, Runner, made_by_model, once_per_runner
from pipeload.tasks.text.batches import by_rows, in_windows
from pipeload.tasks.text.pairs import check_text
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["BATCH_SIZE", "check_embed", "embed"]

BATCH_SIZE = 32
"""The most texts in one pass, unless the caller sets another number: a batch shares one reading of the weights."""
_REMEDY = "Pass fewer texts at once, lower the memory budget, or end other programs."


def embed(
    self: Runner,
    texts: str | Sequence[str | Sequence[int]],
    *,
    batch_size: int = BATCH_SIZE,
    prompt: str | None = None,
    prompt_name: str | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
) -> NDArray[np.float32]:
    """The embedding of each text: `[len(texts), hidden]` float32, or `[hidden]` for a single string.

    Texts longer than the model accepts are cut (with a TruncationWarning). Pooling and normalisation follow the model
    directory's files of sentence-transformers (`modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json`);
    without them, the result is the mean of the token vectors.

    Args:
        self: a model with the output `last_hidden_state`, or `sentence_embedding` where the graph pools.
        texts: one text or several, or the token ids of several, special tokens included, to which no prompt is added;
            passes take them sorted by length, and the result has their original order.
        batch_size: the most texts in one pass; a pass takes fewer if the memory budget cannot hold this many.
        prompt: put before each text, such as `"query: "` for E5; None takes the model's own default, if it has one.
        prompt_name: the name of one of the model's own prompts in `config_sentence_transformers.json` instead.
        normalize: bring each vector to length 1, if the model does not do so anyway.
        truncate_dim: keep this many of the first dimensions of each vector, before `normalize`.

    Raises:
        ConfigError: the model makes no text embeddings, has no tokenizer, no such prompt or a module that pipeload
            lacks, the texts are no sequence, a text is no string or has no tokens, token ids lie outside the
            vocabulary, or an argument is invalid.
        ShardError: a file of the tokenizer or of sentence-transformers is damaged.
        BudgetError: not even a single text fits into the memory budget.

    Example:
        >>> with pipeload.load("models/exported/minilm", "128MB") as model:
        ...     model.embed(["a dog", "a puppy"]).shape
        (2, 384)
    """
    output = _output(self)
    several: Sequence[str | Sequence[int]] = [texts] if isinstance(texts, str) else texts
    check_several(several)
    check_positive("batch_size", batch_size)
    if truncate_dim is not None:
        check_positive("truncate_dim", truncate_dim)
    recipe = _recipe_of(self)
    before = recipe.chosen_prompt(prompt, prompt_name)
    made = in_windows(several, lambda part: _embedded(self, output, recipe, before, part, batch_size))
    with foreign_errors(RunError, f"The vectors of {len(several)} texts could not be put together", _REMEDY):
        vectors = np.stack(made) if made else _none(output, recipe)
        if truncate_dim is not None:
            vectors = vectors[:, :truncate_dim].copy()
        if normalize:
            vectors = normalized(vectors)
    single: NDArray[np.float32] = vectors[0] if isinstance(texts, str) else vectors
    return single


def check_embed(runner: Runner) -> None:
    """Return if `embed` applies what the model's own files of sentence-transformers ask for. No pass is run.

    Raises:
        ConfigError: the model makes no text embeddings, or needs a module, a pooling or a prompt that pipeload lacks.
        ShardError: a file of sentence-transformers is missing or damaged.
    """
    output = _output(runner)
    recipe = _recipe_of(runner)
    recipe.chosen_prompt(None, None)
    width = output.shape[-1]
    if len(output.shape) == 3 and isinstance(width, int):
        tokens = np.ones((1, 1, width), np.float32)
        with made_by_model(output.name, tokens):
            recipe.finish(tokens, np.ones((1, 1), np.int64))


def _embedded(
    runner: Runner,
    output: TensorSpec,
    recipe: _Recipe,
    prompt: str,
    texts: Sequence[str | Sequence[int]],
    batch_size: int,
) -> list[NDArray[np.float32]]:
    def made(
        indices: Sequence[int], arrays: Mapping[str, NDArray[np.int64]], outputs: Mapping[str, Array]
    ) -> list[NDArray[np.float32]]:
        values = outputs[output.name]
        with made_by_model(output.name, values):
            floats = values.astype(np.float32, copy=False)
            pooled = floats if floats.ndim == 2 else recipe.finish(floats, arrays["attention_mask"])
            return [vector for _, vector in zip(indices, pooled, strict=True)]

    tokenizer = tokenizer_of(runner)
    rows = tokenizer.encode_all(
        recipe.prepare(prompt, text) if isinstance(text, str) else tokenizer.checked_ids(text) for text in texts
    )
    return by_rows(runner, rows, batch_size, made)


def _none(output: TensorSpec, recipe: _Recipe) -> NDArray[np.float32]:
    """The vectors of no texts: `[0, hidden]`."""
    width = output.shape[-1] if isinstance(output.shape[-1], int) else 0
    if len(output.shape) == 2 or not width:
        return np.empty((0, width), np.float32)
    return recipe.after_pooling(np.empty((0, width * len(recipe.modes)), np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """The steps from texts to vectors, assembled from the files of sentence-transformers."""

    modes: tuple[str, ...]
    steps: tuple[Step, ...]
    lower: bool
    prompts: Mapping[str, str]
    default_prompt: str
    include_prompt: bool

    def chosen_prompt(self, prompt: str | None, name: str | None) -> str:
        """The text that goes before each text: the caller's, or else the model's."""
        if prompt is not None and name is not None:
            raise ConfigError("prompt and prompt_name are both given. Pass one of them.")
        if prompt is not None:
            check_text(prompt)
        if name is not None and name not in self.prompts:
            known = ", ".join(f"'{each}'" for each in self.prompts) or "none"
            raise ConfigError(f"The model has no prompt with the name {name!r:.80}; it has {known}. Or pass prompt.")
        chosen = prompt if prompt is not None else self.default_prompt if name is None else self.prompts[name]
        if chosen and not self.include_prompt:
            raise ConfigError(
                "The model puts a prompt before a text and leaves it out of the pooling, which pipeload does not do. "
                "Take the token vectors from model.run and pool them yourself."
            )
        return chosen

    def prepare(self, prompt: str, text: str) -> str:
        check_text(text)
        # In this order, as sentence-transformers.
        text = (prompt + text).strip()
        return text.lower() if self.lower else text

    def finish(self, tokens: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.after_pooling(pool(tokens, mask, self.modes))

    def after_pooling(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return reduce(lambda done, step: step(done), self.steps, vectors)


class _Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """`1_Pooling/config.json`; the flags stand in the order in which several modes are concatenated."""

    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False
    include_prompt: bool = True

    def modes(self) -> tuple[str, ...]:
        flags = {
            "cls": self.pooling_mode_cls_token,
            "max": self.pooling_mode_max_tokens,
            "mean": self.pooling_mode_mean_tokens,
            "mean_sqrt_len_tokens": self.pooling_mode_mean_sqrt_len_tokens,
            "weightedmean": self.pooling_mode_weightedmean_tokens,
            "lasttoken": self.pooling_mode_lasttoken,
        }
        if wanted := tuple(mode for mode, wanted in flags.items() if wanted):
            return wanted
        return tuple(self.pooling_mode) if isinstance(self.pooling_mode, list) else (self.pooling_mode or "mean",)


class _Sentence(msgspec.Struct, frozen=True):
    """`sentence_bert_config.json`."""

    do_lower_case: bool | None = None


class _Prompts(msgspec.Struct, frozen=True):
    """`config_sentence_transformers.json`."""

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


@once_per_runner
def _recipe_of(runner: Runner) -> _Recipe:
    files = runner.files
    modules = read_settings(files, "modules.json", list[Module])
    pooling = read_settings(files, f"{pooling_folder(modules)}/config.json", _Pooling)
    prompts = read_settings(files, "config_sentence_transformers.json", _Prompts)
    lower = read_sentence(files, _Sentence).do_lower_case
    return _Recipe(
        modes=pooling.modes(),
        steps=steps(files, modules),
        lower=bool(lower),
        prompts=prompts.prompts,
        default_prompt=prompts.prompts.get(prompts.default_prompt_name or "", ""),
        include_prompt=pooling.include_prompt,
    )


def _output(runner: Runner) -> TensorSpec:
    """The graph output that the vectors come from."""
    manifest = runner.manifest
    outputs = {spec.name: spec for spec in manifest.outputs}
    if "input_ids" in {spec.name for spec in manifest.free_inputs}:
        for name in ("sentence_embedding", "last_hidden_state", "token_embeddings"):
            if name in outputs:
                return outputs[name]
    remedy = "Take its outputs from model.run."
    if manifest.task != "feature-extraction":
        remedy = "Export it with --task feature-extraction."
    raise ConfigError(
        f"embed takes a text model with the output 'last_hidden_state'; this one, for {manifest.task}, takes "
        f"{', '.join(spec.name for spec in manifest.free_inputs)} and makes {', '.join(list(outputs)[:4])}. "
        f"{remedy}"
    )
