"""`pipeload chat`: talk with a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

import pipeload
from pipeload.cli.ending import print_error
from pipeload.cli.generation import (
    Lookup,
    MinNewTokens,
    MinP,
    NoRepeatNgramSize,
    OwnDraft,
    RepetitionPenalty,
    Sample,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    implied_sampling,
)
from pipeload.cli.loudness import LOUDNESS
from pipeload.cli.options import Budget, Directory, Stats, Trace, open_model
from pipeload.cli.report import table
from pipeload.cli.terminal import say
from pipeload.cli.texts import is_typed, read_turns
from pipeload.errors import ClosedError, ConfigError, PipeloadError
from pipeload.format import manifest as manifests
from pipeload.machine.sizes import format_bytes
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.chat.chat import Message, find_template
from pipeload.tasks.generate.options import GenerationOptions, generation_settings
from pipeload.tasks.generate.sequence import Generation
from pipeload.tasks.generate.session import Session
from pipeload.tasks.model_files import GenerationConfig, read_settings
from pipeload.tasks.runner import config_of
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["chat"]

_MAX_NEW_TOKENS = 256
"""The most tokens of an answer, unless the user or the model sets another number; transformers' chat has as many."""

_COMMANDS = {
    "/new": "forget what was said",
    "/exit": "end the conversation, as Ctrl-D does",
    "/help": "show these lines",
}
_HELP = table([*_COMMANDS.items(), ("Ctrl-C", "end an answer")])
"""What a user at a terminal can type beside messages."""


def chat(
    directory: Directory,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before you begin.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Most tokens of an answer; {_MAX_NEW_TOKENS} if the model says nothing."
        ),
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
    seed: Seed = None,
    lookup: Lookup = None,
    draft: OwnDraft = "auto",
    budget: Budget = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines: each answer as an object, when it is complete.")
    ] = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    r"""Talk with a model that has a chat template.

    Each line that you type is answered as the answer comes; from a pipe, each line of it. What was said before is not
    computed again. Ctrl-C ends an answer, which stays in the conversation as far as it came; at the prompt, Ctrl-C
    and Ctrl-D end the conversation, and /help lists what else you can type. Prints tokens/s at the end.
    Omitted options come from generation_config.json, else greedy.

    Needs the extra \[chat].

    Examples:
        pipeload chat models/exported/smollm2-135m --budget 256MB

        pipeload chat models/exported/smollm2-135m --system "Answer in French." --sample --temperature 0.7

        printf 'What is the capital of France?\nAnd of Italy?\n' | pipeload chat models/exported/smollm2-135m
    """
    files = ModelFiles(directory, manifests.read(directory))
    # Invalid arguments are reported before the model is loaded; some templates have no place for a system message.
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    find_template(files).render([*opening, {"role": "user", "content": "Hello"}])
    written = read_settings(files, "generation_config.json", GenerationConfig)
    if max_new_tokens is None:
        max_new_tokens = generation_settings(written, {}).max_new_tokens or _MAX_NEW_TOKENS
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
        "prompt_lookup_num_tokens": lookup,
        "seed": seed,
    }
    generation_settings(written, options)
    own = None if draft == "none" else draft
    opened = open_model(directory, budget, stats=stats, trace=trace, quiet=True, draft=own)
    with opened as model, model.session() as session:
        conversation = _Conversation(model, session, opening, options, max_new_tokens, as_json=as_json)
        try:
            for line in read_turns():
                # A pipe carries nothing but messages.
                if line in _COMMANDS and is_typed():
                    if line == "/exit":
                        break
                    _obey(conversation, line)
                else:
                    _answer(conversation, line)
        except KeyboardInterrupt:
            LOUDNESS.note()
        if conversation.has_answers:
            LOUDNESS.note(conversation.summary)


def _obey(conversation: _Conversation, line: str) -> None:
    """Do what a line with a slash asks for, at a terminal."""
    if line == "/new":
        conversation.begin_anew()
    else:
        say(_HELP, err=True)


def _answer(conversation: _Conversation, line: str) -> None:
    try:
        conversation.answer(line)
    except PipeloadError as error:
        # A user at a terminal can rephrase the line.
        if isinstance(error, ClosedError) or not is_typed():
            raise
        print_error(error)


class _Conversation:
    """The messages so far, and the cost of answering."""

    def __init__(
        self,
        model: pipeload.Model,
        session: Session[pipeload.DecodeState],
        opening: Sequence[Message],
        options: GenerationOptions,
        max_new_tokens: int,
        *,
        as_json: bool = False,
    ) -> None:
        self._opening = tuple(opening)
        self._as_json = as_json
        self._model = model
        self._session = session
        self._messages = list(opening)
        self._options = options
        self._max_new_tokens = max_new_tokens
        self._tokens, self._seconds, self._read_bytes = 0, 0.0, 0

    @property
    def has_answers(self) -> bool:
        """Whether the model has been asked anything."""
        return self._seconds > 0

    def begin_anew(self) -> None:
        """Forget what was said, but for the system message."""
        self._messages = list(self._opening)

    @property
    def summary(self) -> str:
        """Tokens and bytes, in all and per second of answering."""
        seconds = max(self._seconds, 1e-9)
        return (
            f"{self._tokens} tokens in {seconds:.1f} s, {self._tokens / seconds:.1f} tokens/s; "
            f"{format_bytes(self._read_bytes)} read, {self._read_bytes / seconds / 1e9:.2f} GB/s"
        )

    def answer(self, line: str) -> None:
        """Print the model's answer as it comes; Ctrl-C ends it, and the answer is the text up to then."""
        asked = [*self._messages, {"role": "user", "content": line}]
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if not self._as_json:
                say(piece, nl=False)

        begin_s, read_bytes = time.perf_counter(), self._model.stats.read_bytes
        made = None
        try:
            prompt = self._model.chat_prompt(asked)
            options: GenerationOptions = {**self._options, "max_new_tokens": self._room(prompt), "streamer": show}
            made = self._session.generate(prompt, **options)
            self._tokens += len(made.token_ids)
        except KeyboardInterrupt:
            text = "".join(pieces)
            self._tokens += len(tokenizer_of(self._model).encode(text, add_special_tokens=False).ids)
        except PipeloadError:
            if pieces and not self._as_json:
                say()
            raise
        finally:
            self._seconds += time.perf_counter() - begin_s
            self._read_bytes += self._model.stats.read_bytes - read_bytes
        self._end_answer("".join(pieces), made)
        if pieces:
            # Templates require questions and answers in turn: a question without an answer is dropped.
            self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        if made and made.finish_reason == "length":
            self._say_cut(len(made.token_ids))

    def _end_answer(self, text: str, made: Generation | None) -> None:
        if not self._as_json:
            say()
            return
        reason = made.finish_reason if made else "interrupted"
        tokens = len(made.token_ids) if made else None
        row = {"role": "assistant", "content": text, "finish_reason": reason, "tokens": tokens}
        say(msgspec.json.encode(row).decode())

    def _room(self, prompt: Sequence[int]) -> int:
        """The most tokens of the answer to a prompt."""
        positions = config_of(self._model).max_positions
        if positions is None:
            return self._max_new_tokens
        if len(prompt) >= positions:
            raise ConfigError(
                f"The conversation has {len(prompt)} tokens now, and the model has positions for {positions}, answer "
                "included. Say less, or begin a new one."
            )
        return min(self._max_new_tokens, positions - len(prompt))

    def _say_cut(self, tokens: int) -> None:
        remedy = "--max-new-tokens allows more" if tokens == self._max_new_tokens else "the model has no more positions"
        LOUDNESS.note(f"note: the answer was cut after {tokens} tokens; {remedy}.")
