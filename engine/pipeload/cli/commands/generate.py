"""`pipeload generate`: continue a text."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import pipeload
from pipeload.cli.generation import (
    Draft,
    Lookup,
    MinNewTokens,
    MinP,
    NoRepeatNgramSize,
    RepetitionPenalty,
    Sample,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    implied_sampling,
)
from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, open_model, status
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.cli.texts import read_text, refuse_images
from pipeload.tasks.generate.generate import generate as generate_text
from pipeload.tasks.generate.options import GenerationOptions
from pipeload.tasks.model_files import MAX_NEW_TOKENS

__all__ = ["generate"]


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"Most tokens to add; {MAX_NEW_TOKENS} if the model says nothing."),
    ] = None,
    min_new_tokens: MinNewTokens = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    stop: Stop = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --sample: N texts instead of one.")
    ] = None,
    seed: Seed = None,
    lookup: Lookup = None,
    draft: Draft = "auto",
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With --json: the log-probability of each token.")
    ] = False,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Continue a text.

    Prints the text and its continuation as it comes. It ends where the model ends it, after a --stop, or after the
    tokens asked for. Omitted options come from generation_config.json, else greedy.

    Examples:
        pipeload generate models/exported/smollm2-135m "The capital of France is" --max-new-tokens 8 --budget 256MB

        pipeload generate models/exported/smollm2-135m "Once upon a time" --sample --temperature 0.7 --seed 1 --stop .

        pipeload generate models/exported/smollm2-135m - --lookup 10 --json < prompt.txt
    """
    refuse_images([prompt], "generate")
    if logprobs and not as_json:
        raise typer.BadParameter("--logprobs needs --json.")
    text = read_text().rstrip("\n") if prompt == "-" else prompt
    options: GenerationOptions = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": implied_sampling(do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "stop_strings": stop,
        "seed": seed,
        "prompt_lookup_num_tokens": lookup,
        "logprobs": logprobs,
    }
    with ExitStack() as stack:
        if draft not in ("auto", "none"):
            # Opened first, so that it stays in memory: the other model counts the memory it occupies.
            options["assistant_model"] = stack.enter_context(pipeload.load(Path(draft), budget, draft=None))
        own = "auto" if draft == "auto" else None
        model = stack.enter_context(open_model(directory, budget, stats=stats, trace=trace, quiet=True, draft=own))
        if num_return_sequences is not None:
            with status("Generating"):
                several = generate_text(model, text, num_return_sequences=num_return_sequences, **options)
            if as_json:
                print_json([{"prompt": text, **asdict(made)} for made in several])
            else:
                say("\n\n".join(f"{text}{made.text}" for made in several))
            return
        if as_json:
            with status("Generating"):
                made = generate_text(model, text, **options)
            print_json({"prompt": text, **asdict(made)})
            return
        started = False

        def show(piece: str) -> None:
            # Print the prompt only now, so that an error leaves nothing on stdout.
            nonlocal started
            say(piece if started else text + piece, nl=False)
            started = True

        options["streamer"] = show
        made = generate_text(model, text, **options)
        say("" if started else text)
        if stats:
            say(
                f"{len(made.token_ids)} tokens in {made.sweeps} sweeps; {made.accepted_tokens} of "
                f"{made.drafted_tokens} guesses were right",
                err=True,
            )
