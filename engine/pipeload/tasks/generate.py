"""Text generation, with the KV caches kept between the steps.

```
prompts -> token ids -> left-padded batch -> step -> logits -> choose -> step -> ... -> ids -> texts
                                              '------- one pass over all blocks per token ------'
```
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TypeAlias, TypeGuard, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.tasks.batch import padded, position_ids
from pipeload.tasks.config import GenerationConfig
from pipeload.tasks.options import GenerationOptions, check_call, generation_settings
from pipeload.tasks.runner import Decoder, State, config_of, free_inputs, graph_inputs
from pipeload.tasks.sampling import Logits, LogitsProcessor, logits_processors, sequence_generator
from pipeload.tasks.sequence import Generation, GrowingSequence
from pipeload.tasks.streaming import Streamer, TextStream
from pipeload.tasks.text import Tokenizer, tokenizer_of

__all__ = ["Generation", "Prompt", "generate"]

Prompt: TypeAlias = str | Sequence[int] | NDArray[np.integer]
"""A text, or its token ids."""


@overload
def generate(
    runner: Decoder[State],
    prompt: Prompt,
    *,
    num_return_sequences: None = ...,
    **options: Unpack[GenerationOptions],
) -> Generation: ...
@overload
def generate(
    runner: Decoder[State], prompt: Prompt, *, num_return_sequences: int, **options: Unpack[GenerationOptions]
) -> list[Generation]: ...
@overload
def generate(
    runner: Decoder[State],
    prompt: list[str] | list[list[int]],
    *,
    num_return_sequences: int | None = ...,
    **options: Unpack[GenerationOptions],
) -> list[Generation]: ...
def generate(
    runner: Decoder[State],
    prompt: Prompt | list[str] | list[list[int]],
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    num_return_sequences: int | None = None,
    seed: int | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    logprobs: bool = False,
    streamer: Streamer | None = None,
) -> Generation | list[Generation]:
    """Continue a prompt, or each of a list of prompts.

    A list is run as one batch, which reads the weights once per token for all of its prompts; padding changes no text.
    Names and meanings are those of transformers. What is None is taken from the model's `generation_config.json`, and
    where that says nothing from transformers: greedy, or with `do_sample` temperature 1 and the 50 likeliest tokens.
    Other settings in that file (beams, bad words ...) are not looked at.

    Args:
        runner: a model exported for text-generation with KV caches.
        prompt: a text, its token ids, or a list of either.
        max_new_tokens: most tokens to make for each prompt; 64 if the file has none.
        min_new_tokens: no end-of-text token before so many.
        do_sample: draw each token by its probability, instead of taking the likeliest.
        temperature: what logits are divided by before drawing. This and the next three have no effect without
            `do_sample`.
        top_k: draw from so many of the likeliest tokens; 0 from all.
        top_p: draw from the fewest of the likeliest tokens whose probabilities add up to this; 1 from all.
        min_p: draw from tokens at least this many times as likely as the likeliest.
        repetition_penalty: what positive logits of tokens that are in prompt or text already are divided by, and
            negative ones multiplied; 1 changes nothing.
        no_repeat_ngram_size: no so many tokens in a row come twice, prompt included; 0 allows it.
        stop_strings: texts that end a sequence as soon as the new text contains one, wherever it lies in the tokens.
            The text keeps it. Special tokens such as `<|im_end|>` can be given too, though the text does not show them.
            min_new_tokens does not hold stop strings back.
        eos_token_id: tokens that end the text, instead of those that the model names; an empty list for none.
        num_return_sequences: sequences for each prompt, as a list, those of the first prompt first; more than one need
            `do_sample`. None gives one, not in a list of its own.
        seed: makes draws repeatable; None draws anew each time. Each sequence has random numbers of its own, from the
            seed, the index of its prompt and its index among those of the prompt: what else is in the batch changes
            nothing.
        logits_processor: called for each token, after the penalties and before the temperature, with
            `token_ids` int64 `[batch, length]`, prompt and text, and `logits` float32 `[batch, vocabulary]`; returns
            logits of that shape. The sequences of a batch come one by one, so that there is no padding: batch is 1.
        logprobs: give the log-probabilities of the new tokens.
        streamer: called with each piece of new text as soon as it is known, or a `TextStream`; for a single sequence.

    Raises:
        ConfigError: the model generates no text, a prompt is empty, has ids outside the vocabulary or is too
            long together with `max_new_tokens`, texts are wanted where there is no tokenizer, an argument cannot
            work, or no token is left that could come.
        RunError: the model computed no numbers (NaN).

    Examples:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model:
        ...     model.generate("The capital of France is", max_new_tokens=2).text
        ...     story = model.generate("Once upon a time", do_sample=True, temperature=0.7, seed=1, stop_strings=".")
        ...     story.text[:33], story.finish_reason
        ' Paris.'
        (', there was a magnificent ship in', 'stop')
    """
    with streamer.generation() if isinstance(streamer, TextStream) else nullcontext():
        _check_model(runner)
        settings = generation_settings(
            runner.directory,
            {
                "max_new_tokens": max_new_tokens,
                "min_new_tokens": min_new_tokens,
                "do_sample": do_sample,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "no_repeat_ngram_size": no_repeat_ngram_size,
                "stop_strings": stop_strings,
                "eos_token_id": eos_token_id,
            },
        )
        check_call(
            settings,
            num_return_sequences=num_return_sequences,
            seed=seed,
            logits_processor=logits_processor,
            streamer=streamer,
        )
        prompts, single = _listed(prompt)
        copies = num_return_sequences or 1
        if streamer is not None and (not single or copies > 1):
            raise ConfigError("streamer takes a single sequence. Pass the prompts one by one, or leave streamer out.")
        texts = any(isinstance(one, str) for one in prompts)
        tokenizer = _tokenizer(runner, required=texts or streamer is not None or bool(settings.stop_strings))
        rows = [_token_ids(one, tokenizer) for one in prompts]
        _check_rows(runner, rows, settings.token_limit)
        eos_ids = _eos_ids(runner, settings, tokenizer)
        if seed is None:
            seed = cast("int", np.random.SeedSequence().entropy)
        sequences = [
            GrowingSequence(
                row,
                settings,
                eos_ids,
                tokenizer,
                logits_processors(settings, prompt_tokens=len(row), eos_ids=eos_ids, custom=logits_processor),
                sequence_generator(seed, index, copy) if settings.do_sample else None,
                logprobs=logprobs,
            )
            for index, row in enumerate(rows)
            for copy in range(copies)
        ]
        _extend(runner, sequences, settings.token_limit, streamer)
        results = [sequence.result() for sequence in sequences]
        return results[0] if single and num_return_sequences is None else results


def _extend(
    runner: Decoder[State], sequences: Sequence[GrowingSequence], max_new_tokens: int, streamer: Streamer | None
) -> None:
    """Add tokens until every sequence has ended, or the reader has closed its stream."""
    rows = [sequence.ids for sequence in sequences]
    tokens = padded(rows, fill=0, side="left")
    mask = padded([[1] * len(row) for row in rows], fill=0, side="left")
    with runner.new_state(tokens.shape[1] + max_new_tokens) as state:
        while running := [(row, one) for row, one in enumerate(sequences) if one.finish_reason is None]:
            if isinstance(streamer, TextStream) and streamer.closed:
                return
            offered = {
                "input_ids": tokens,
                "attention_mask": mask,
                "position_ids": position_ids(mask)[:, -tokens.shape[1] :],
                "token_type_ids": np.zeros_like(tokens),
            }
            # Not kept: what callers keep counts in the budget of the next step.
            _push(runner.step(graph_inputs(runner, offered), state), running, streamer)
            # Rows that have ended are carried along, because the caches are one array for the whole batch.
            tokens = np.array([sequence.ids[-1:] for sequence in sequences], np.int64)
            mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)


def _push(logits: Logits, running: Sequence[tuple[int, GrowingSequence]], streamer: Streamer | None) -> None:
    """Give each sequence its row of the logits, and the text of that to the streamer."""
    for row, sequence in running:
        piece = sequence.push(logits[row : row + 1].astype(np.float32, copy=False))
        if piece and streamer is not None:
            streamer(piece)


def _listed(prompt: Prompt | Sequence[str] | Sequence[Sequence[int]]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether there was only one that was not in a list."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt], True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise _not_a_prompt(prompt)
    return list(cast("Sequence[Prompt]", prompt)), False


def _token_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str) and tokenizer:
        return list(tokenizer.encode(prompt).ids)
    if not _are_ids(prompt):
        raise _not_a_prompt(prompt)
    return [int(token) for token in prompt]


def _are_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes):
        return False
    return all(isinstance(token, int | np.integer) for token in prompt)


def _not_a_prompt(prompt: object) -> ConfigError:
    return ConfigError(f"A prompt must be a text or a sequence of token ids, not {prompt!r:.80}.")


def _tokenizer(runner: Decoder[State], *, required: bool) -> Tokenizer | None:
    """The model's tokenizer. Token ids go without one, and then only the text of the answer is missing."""
    try:
        return tokenizer_of(runner)
    except ConfigError:
        if required:
            raise
        return None


def _eos_ids(runner: Decoder[State], settings: GenerationConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    named = tokenizer.eos_id if tokenizer else None
    for ids in (settings.eos_token_id, config_of(runner).eos_token_id, named):
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _check_model(runner: Decoder[State]) -> None:
    manifest = runner.manifest
    if manifest.task != "text-generation":
        raise ConfigError(
            f"generate takes a model for text-generation; this one is for {manifest.task}. "
            "Export it with --task text-generation, or use model.run."
        )
    if not manifest.caches:
        raise ConfigError(
            "The model was exported without KV caches, so every token would need a pass over the whole text. "
            "Export it with --task text-generation-with-past."
        )


def _check_rows(runner: Decoder[State], rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = config_of(runner)
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    if shortest == 0:
        raise ConfigError("A prompt is empty: it has no tokens.")
    if config.max_positions is not None and longest + max_new_tokens > config.max_positions:
        raise ConfigError(
            f"The prompt has {longest} tokens; with {max_new_tokens} new ones that is more than the "
            f"{config.max_positions} that the model has positions for. Shorten the prompt or lower max_new_tokens."
        )
    limit = config.vocab_size or np.iinfo(np.int32).max
    if outside := [token for row in rows for token in row if not 0 <= token < limit]:
        raise ConfigError(f"Token id {outside[0]} is outside the model's vocabulary of {limit}.")
    inputs = {spec.name for spec in free_inputs(runner.manifest)}
    if shortest < longest and (missing := {"attention_mask", "position_ids"} - inputs):
        raise ConfigError(
            f"The prompts have different lengths, and the model has no input '{min(missing)}' to tell padding "
            "from text. Pass the prompts one by one."
        )
