"""Text generation, with the KV caches kept between the steps.

```
prompts -> token ids -> left-padded batch -> step -> logits -> choose -> step -> ... -> ids -> texts
                                              '------- one pass over all blocks per token ------'
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Unpack, cast, overload

import numpy as np

from pipeload.errors import ClosedError
from pipeload.planning.drafting import MOST_DRAFTS
from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.drafts import Assistant, PromptLookup
from pipeload.tasks.generate.loop import extend, extend_with_drafts
from pipeload.tasks.generate.options import (
    GenerationOptions,
    check_call,
    drafted_tokens,
    generation_settings,
    lookup_tokens,
    warn_of_unused,
)
from pipeload.tasks.generate.own_draft import OwnGuesses
from pipeload.tasks.generate.prompts import (
    Prompt,
    check_assistant,
    check_model,
    check_rows,
    eos_ids,
    joined,
    listed,
    token_ids,
    tokenizer_if_any,
    within_length,
)
from pipeload.tasks.generate.sampling import TokenChooser, sequence_generator
from pipeload.tasks.generate.sequence import Generation, GrowingSequence
from pipeload.tasks.generate.streaming import TextStream
from pipeload.tasks.runner import Decoder, State, generation_config_of

__all__ = ["Generation", "Prompt", "generate"]


@overload
def generate(
    self: Decoder[State],
    prompt: Prompt,
    *,
    num_return_sequences: None = ...,
    **options: Unpack[GenerationOptions],
) -> Generation: ...
@overload
def generate(
    self: Decoder[State], prompt: Prompt, *, num_return_sequences: int, **options: Unpack[GenerationOptions]
) -> list[Generation]: ...
@overload
def generate(
    self: Decoder[State],
    prompt: list[str] | list[list[int]],
    *,
    num_return_sequences: int | None = ...,
    **options: Unpack[GenerationOptions],
) -> list[Generation]: ...
def generate(
    self: Decoder[State],
    prompt: Prompt | list[str] | list[list[int]],
    *,
    num_return_sequences: int | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation | list[Generation]:
    """Continue a prompt, or each of a list of prompts.

    A list is run as one batch, which reads the weights once per token for all of its prompts; padding changes no text.
    Where a model cannot tell padding from text, only prompts of one length share passes.
    Names and meanings are those of transformers. An option that is None comes from the model's
    `generation_config.json`, or else from transformers' defaults: greedy, or with `do_sample` temperature 1 and the 50
    likeliest tokens. Other settings in that file that change the text (beams, bad words ...) have no effect: a warning
    names them.
    The texts of a model that is quantised dynamically are made one after another, without drafts.

    Args:
        self: a model exported for text-generation with KV caches.
        prompt: a text, its token ids, or a list of either.
        max_new_tokens: the most tokens to make for each prompt; 64 if the file sets none.
        min_new_tokens: the text does not end before this many new tokens.
        do_sample: draw each token by its probability, instead of taking the likeliest.
        temperature: the divisor of the logits before drawing; 0 takes the likeliest token. This and the next three have
            no effect without `do_sample`: a warning says so.
        top_k: draw from this many of the likeliest tokens; 0 from all.
        top_p: draw from the smallest set of likeliest tokens whose probabilities add up to this; 1 from all.
        min_p: draw from tokens at least this many times as likely as the likeliest.
        repetition_penalty: for tokens that are already in prompt or text, positive logits are divided by this, and
            negative ones multiplied; 1 changes nothing.
        no_repeat_ngram_size: no n-gram of this size may occur twice, prompt included; 0 turns the rule off.
        stop_strings: texts that end a sequence as soon as the new text contains one, wherever it lies in the tokens.
            The text keeps it. Special tokens such as `<|im_end|>` work too, though the text does not show them.
            min_new_tokens does not hold stop strings back.
        eos_token_id: tokens that end the text, instead of those that the model names; an empty list for none.
        num_return_sequences: sequences for each prompt, as a list, those of the first prompt first; more than one needs
            `do_sample`. None gives one, not in a list of its own.
        prompt_lookup_num_tokens: guess at most this many tokens from earlier continuations of the same tokens, in
            prompt or text, and check them in one pass; 0 for none. This and the next three change only the number of
            passes, not the text; for a single sequence. The number of guessed tokens follows from measurements.
        max_matching_ngram_size: compare at most this many tokens for that; 2 if neither the caller nor a file sets it.
        assistant_model: another open model, with the same vocabulary, to guess the tokens.
        num_assistant_tokens: it guesses at most this many tokens for a pass; None takes the number from its own
            `generation_config.json`, or 20. Without `assistant_model` and lookup the model's own draft guesses, where
            it is open (see `load`).
        seed: makes draws repeatable; None draws anew each time. Each sequence has random numbers of its own, from the
            seed, the index of its prompt and its index among the sequences of that prompt: the rest of the batch
            changes nothing.
        logits_processor: called for each token, after the penalties and before the temperature, with
            `token_ids` int64 `[batch, length]`, prompt and text, and `logits` float32 `[batch, vocabulary]`; returns
            logits of that shape. The sequences of a batch come one by one, without padding: batch is 1.
        logprobs: return the log-probabilities of the new tokens.
        top_logprobs: return this many of the likeliest tokens in the place of each new one too, with their
            log-probabilities.
        streamer: called with each piece of new text as soon as it is complete, or a `TextStream`; for a single
            sequence.
        on_token: called with each new token of each sequence, a `NewToken`, as soon as it is chosen.

    Raises:
        ConfigError: the model generates no text, a prompt is empty, has ids outside the vocabulary or is too
            long together with `max_new_tokens`, the call needs a tokenizer and the model has none, an argument is
            invalid, or the rules leave no token to choose.
        RunError: the model computed no numbers (NaN).

    Examples:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model:
        ...     model.generate("The capital of France is", max_new_tokens=2).text
        ...     story = model.generate("Once upon a time", do_sample=True, temperature=0.7, seed=1, stop_strings=".")
        ...     story.text[:33], story.finish_reason
        ' Paris.'
        (', there was a magnificent ship in', 'stop')
    """
    with called(options):
        prompts, single = listed(prompt)
        results = generate_prompts(self, prompts, options, num_return_sequences)
        return results[0] if single and num_return_sequences is None else results


def called(options: GenerationOptions) -> AbstractContextManager[None]:
    """The context of a call: its stream, if it has one, ends with it."""
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        raise TypeError(f"generate() got an unexpected keyword argument '{min(unknown)}'")
    streamer = options.get("streamer")
    return streamer.generation() if isinstance(streamer, TextStream) else nullcontext()


def generate_prompts(
    runner: Decoder[State],
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    num_return_sequences: int | None,
    reading_by: Callable[[Decoder[Any]], Reading[Any]] | None = None,
) -> list[Generation]:
    check_model(runner)
    settings = generation_settings(generation_config_of(runner), options)
    warn_of_unused(settings, options)
    copies = num_return_sequences or 1
    lookup = lookup_tokens(settings, options, len(prompts) * copies)
    check_call(settings, options, num_return_sequences, len(prompts) * copies, lookup)
    streamer, assistant = options.get("streamer"), options.get("assistant_model")
    texts = any(isinstance(one, str) for one in prompts)
    tokenizer = tokenizer_if_any(runner, required=texts or streamer is not None or bool(settings.stop_strings))
    rows = [token_ids(one, tokenizer) for one in prompts]
    settings = within_length(settings, rows)
    check_rows(runner, rows, settings.token_limit)
    if assistant is not None:
        check_assistant(runner, assistant)
    ends = eos_ids(runner, settings, tokenizer)
    seed = options.get("seed")
    if seed is None:
        seed = cast("int", np.random.SeedSequence().entropy)
    top_logprobs = options.get("top_logprobs", 0)
    sequences = [
        GrowingSequence(
            row,
            settings,
            ends,
            tokenizer,
            TokenChooser(
                settings,
                prompt_tokens=len(row),
                eos_ids=ends,
                custom=options.get("logits_processor", ()),
                generator=sequence_generator(seed, index, copy) if settings.do_sample else None,
                least_top=max(1, top_logprobs),
            ),
            logprobs=options.get("logprobs", False),
            top_logprobs=top_logprobs,
            index=index * copies + copy,
            on_token=options.get("on_token"),
        )
        for index, row in enumerate(rows)
        for copy in range(copies)
    ]
    with ExitStack() as stack:

        def read_by(decoder: Decoder[Any]) -> Reading[Any]:
            if reading_by is not None:
                reading = reading_by(decoder)
            else:
                state = decoder.new_state()
                stack.enter_context(state)
                reading = Reading(decoder, state)
            reading.state.expect(max(map(len, rows)) + settings.token_limit)
            return reading

        reading = read_by(runner)
        alone = runner.manifest.quantised_dynamically
        if assistant is not None and not alone:
            most = drafted_tokens(assistant, settings, options)
            extend_with_drafts(reading, sequences[0], Assistant(read_by(assistant), runner), most, streamer)
        elif lookup and not alone:
            guesser = PromptLookup(settings.max_matching_ngram_size or 2)
            extend_with_drafts(reading, sequences[0], guesser, lookup, streamer)
        elif len(sequences) == 1 and not alone and (own := _own_guesses(runner, read_by)):
            most = settings.num_assistant_tokens or MOST_DRAFTS
            extend_with_drafts(reading, sequences[0], own, most, streamer, runner.own_draft)
        else:
            for indices in joined(runner.manifest, [len(one.ids) for one in sequences]):
                if alone:
                    # From its beginning: tokens that are computed together share scales.
                    reading.state.truncate(0)
                extend(reading, [sequences[index] for index in indices], streamer)
    return [sequence.result() for sequence in sequences]


def _own_guesses(runner: Decoder[Any], read_by: Callable[[Decoder[Any]], Reading[Any]]) -> OwnGuesses | None:
    """The guesses of a model's own draft, with room for the text; None where there is no open one."""
    own = runner.own_draft
    model = own.model if own else None
    if own is None or model is None:
        return None
    try:
        reading = read_by(model)
    except ClosedError:  # it was left out at this moment
        return None
    own.make_room()
    return OwnGuesses(reading, runner, own)
