"""Answers that follow a grammar, by llguidance (extra `guided`): at each place, only tokens that it allows can come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeload.errors import BudgetError, ConfigError
from pipeload.foreign import foreign_errors
from pipeload.machine.sizes import format_bytes
from pipeload.serve.errors import ApiError
from pipeload.tasks.generate.prompts import eos_ids, tokenizer_if_any
from pipeload.tasks.generate.sampling import Logits, LogitsProcessor, TokenIds
from pipeload.tasks.runner import Decoder, Runner, config_of, generation_config_of, once_per_runner

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["Call", "follow", "json_grammar", "text_with_calls"]

_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as models were trained to write it: a small one may otherwise go on with it for ever."""

_READING_BYTES, _MAKING_BYTES, _KEPT_BYTES = 8, 1100, 900
"""What llguidance and its form of a tokenizer take: for each byte of the file while it is read, for each token while it
is made, and for each token as long as it is kept. SmolLM2's 49,152 tokens took 61 MB at once, and 43 MB stayed."""
_ENTRY_BYTES = 32
"""Of a token in the file, where the config does not tell their number."""


def follow(runner: Runner, grammar: Callable[[], str], *, prompt_tokens: int, param: str) -> LogitsProcessor:
    """A rule that lets only tokens through that the grammar allows.

    Args:
        runner: the model.
        grammar: gives it, as llguidance has it; called when llguidance has its place in memory.
        prompt_tokens: tokens before the answer.
        param: the field of the request that asks for it.

    Raises:
        ApiError: nothing, or nothing that llguidance knows, follows the grammar.
        ConfigError: llguidance is not installed, or the model has no tokenizer or no token that ends a text.
    """
    tokenizer = _tokenizer_of(runner)
    library, made = _library(), grammar()
    if fault := library.LLMatcher.validate_grammar(made, tokenizer):
        line = " ".join(str(fault).split())
        raise ApiError(400, f"No answer can follow {param}: {line:.400}.", code="unsupported_grammar", param=param)
    return _Rule(library.LLMatcher(tokenizer, made, log_level=0), prompt_tokens)


def json_grammar(schema: Mapping[str, Any], param: str) -> str:
    """The grammar of JSON that fits a schema.

    Raises:
        ApiError: it is no schema.
        ConfigError: llguidance is not installed.
    """
    try:
        return str(_library().LLMatcher.grammar_from_json_schema(dict(schema), overrides=_SPACES))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{param} is no JSON schema: {error}.", param=param) from error


class Call:
    """A function call within a text.

    Args:
        begin: the text before its arguments; begins with `trigger`.
        arguments: their JSON schema.
        end: the text after them.
    """

    def __init__(self, begin: str, arguments: Mapping[str, Any], end: str) -> None:
        self.begin, self.arguments, self.end = begin, arguments, end


def text_with_calls(trigger: str, calls: list[Call], param: str) -> str:
    """The grammar of free text in which calls come after a trigger, if at all."""
    library = _library()
    schemas = [{**call.arguments, "x-guidance": _SPACES} for call in calls]
    with foreign_errors(ConfigError, f"{param} cannot be made a grammar", "Send simpler functions."):
        tags = [
            library.StructTag(trigger=trigger, begin=call.begin, grammar=schema, end=call.end)
            for call, schema in zip(calls, schemas, strict=True)
        ]
        return str(library.StructTag.to_grammar(tags, assume_special=False))


class _Rule:
    """Follows each sequence of a call: they come one by one, a token longer each time."""

    def __init__(self, matcher: Any, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._matchers: dict[tuple[int, ...], Any] = {(): matcher}

    def __call__(self, token_ids: TokenIds, logits: Logits) -> Logits:
        answer = tuple(token_ids[0, self._prompt_tokens :].tolist())
        matcher = self._matchers.get(answer)
        if matcher is None:
            matcher = self._matchers[answer[:-1]].deep_copy()
            matcher.consume_token(answer[-1])
            self._matchers[answer] = matcher
            # All sequences grow together.
            for shorter in [one for one in self._matchers if 0 < len(one) < len(answer) - 1]:
                del self._matchers[shorter]
        if matcher.is_error():
            raise ConfigError(f"The answer cannot go on by its grammar: {matcher.get_error():.200}")
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.zeros(logits.shape[1], bool)
        count = min(len(bits), len(allowed))
        allowed[:count] = bits[:count]
        logits[0, ~allowed] = -np.inf
        return logits


@once_per_runner
def _tokenizer_of(runner: Runner) -> Any:
    """Llguidance's own form of the model's tokenizer, made in memory that weights have left."""
    decoder: Decoder[Any] = runner  # type: ignore[assignment] # one that generates
    ends = eos_ids(decoder, generation_config_of(runner), tokenizer_if_any(decoder, required=True))
    if not ends:
        raise ConfigError("The model names no token that ends a text, so no answer can end by a grammar.")
    data = runner.files.read("tokenizer.json") or b""
    model: Model = runner  # type: ignore[assignment] # a server has no others
    most_tokens = config_of(runner).vocab_size
    tokens = most_tokens or len(data) // _ENTRY_BYTES
    most_bytes = _READING_BYTES * len(data) + _MAKING_BYTES * tokens
    try:
        with model.room_for(most_bytes, _KEPT_BYTES * tokens):
            return _made(data.decode(), sorted(ends), most_tokens)
    except BudgetError as error:
        raise ApiError(
            400,
            f"Answers by a grammar take up to {format_bytes(most_bytes)} more here. {error}",
            code="memory_budget_exceeded",
        ) from error


def _made(data: str, ends: list[int], most: int | None) -> Any:
    library = _library()
    with foreign_errors(ConfigError, "The model's tokenizer cannot be used with llguidance", "Leave the grammar out."):
        found = library.LLTokenizer(data, eos_token=ends)
        if most is None or most <= found.vocab_size:
            return found
        # Two at once would take twice the memory.
        del found
        return library.LLTokenizer(data, n_vocab=most, eos_token=ends)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError("Grammars, schemas and tools need llguidance: pip install llguidance.") from error
    return llguidance
