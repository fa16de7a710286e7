"""From messages to the prompt that a chat model was trained to answer, by the chat template in its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from pipeload.errors import ConfigError, ShardError
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.model_files import AddedToken, read_settings, token_text
from pipeload.tasks.runner import Runner, once_per_runner
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.tasks.chat.template import ChatTemplate

__all__ = ["Message", "chat_prompt", "find_template"]

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `role` (`system`, `user` or `assistant`) and `content`."""

_FILE = "chat_template.jinja"
_DEFAULT = "default"


def chat_prompt(
    self: Runner, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
) -> list[int]:
    """The token ids of a conversation, as the model's own chat template writes it.

    They equal those of `apply_chat_template` in transformers. The template comes from `chat_template.jinja`, or else
    from `tokenizer_config.json`; of several, the one named `default` is used. Templates run in a sandbox.

    Args:
        self: a model with a chat template and a tokenizer.
        messages: the conversation so far, dicts with `role` (`system`, `user`, `assistant`) and `content`.
        add_generation_prompt: end with the tokens that come before an answer of the model.
        **variables: other variables of the template, such as `enable_thinking=False`.

    Raises:
        ConfigError: the model has no chat template or no tokenizer, jinja2 is not installed, or the template cannot
            take these messages.
        ShardError: the template is damaged, or uses a feature that the sandbox refuses.

    Example:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model, model.session() as session:
        ...     messages = [{"role": "user", "content": "What is the capital of France?"}]
        ...     answer = session.generate(model.chat_prompt(messages)).text
        ...     messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}]
        ...     session.generate(model.chat_prompt(messages)).text  # computes what is new
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(f"messages must be a sequence of at least one message, not {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"A message must be a dict with 'role' and 'content', not {message!r:.80}.")
    template = _template_of(self)
    text = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
    # The template has already added the special tokens.
    return list(tokenizer_of(self).encode(text, add_special_tokens=False).ids)


def find_template(files: ModelFiles) -> ChatTemplate:
    """The chat template among the files of a model.

    Raises:
        ConfigError: there is none, none of several is the default, or jinja2 is not installed.
        ShardError: a file is damaged.
    """
    settings = read_settings(files, "tokenizer_config.json", _TokenizerConfig)
    where, source = files.path(_FILE), _text(files, _FILE)
    if source is None:
        where, source = files.path("tokenizer_config.json"), _default(settings)
    if source is None:
        raise ConfigError(
            f"{where.parent} has no chat template, neither {_FILE} nor one in tokenizer_config.json, so it is "
            "probably not a chat model. Take its instruct or chat version, or continue texts with generate."
        )
    try:
        from pipeload.tasks.chat.template import ChatTemplate
    except ImportError as error:
        raise ConfigError("Chat templates need jinja2: pip install jinja2.") from error
    return ChatTemplate(source, str(where), _special_tokens(files, settings))


def _text(files: ModelFiles, name: str) -> str | None:
    data = files.read(name)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"{files.path(name)} is no UTF-8 text: {error.reason} at byte {error.start}.") from error


def _default(settings: _TokenizerConfig) -> str | None:
    """The template in the settings; of several named templates, the one named `default`."""
    if settings.chat_template is None or isinstance(settings.chat_template, str):
        return settings.chat_template
    named = {one.name: one.template for one in settings.chat_template}
    if _DEFAULT not in named:
        raise ConfigError(
            f"tokenizer_config.json has chat templates with the names {sorted(named)}, and none is '{_DEFAULT}'. "
            f"Put the one that you want into {_FILE}."
        )
    return named[_DEFAULT]


@once_per_runner
def _template_of(runner: Runner) -> ChatTemplate:
    return find_template(runner.files)


class _SpecialTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Special tokens by their names in templates; null means the same as a missing field."""

    bos_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    unk_token: str | AddedToken | None = None
    sep_token: str | AddedToken | None = None
    pad_token: str | AddedToken | None = None
    cls_token: str | AddedToken | None = None
    mask_token: str | AddedToken | None = None
    additional_special_tokens: list[str | AddedToken] | None = None


class _Named(msgspec.Struct, frozen=True):
    name: str
    template: str


class _TokenizerConfig(_SpecialTokens, frozen=True, kw_only=True):
    chat_template: str | list[_Named] | None = None
    added_tokens_decoder: dict[str, Any] | None = None


def _special_tokens(files: ModelFiles, settings: _TokenizerConfig) -> dict[str, str | list[str]]:
    """The special tokens that the tokenizer of transformers would have."""
    sources: list[_SpecialTokens] = [settings]
    if settings.added_tokens_decoder is None:
        # Tokenizers from before it have their special tokens in a file that takes precedence.
        sources.insert(0, read_settings(files, "special_tokens_map.json", _SpecialTokens))
    found: dict[str, str | list[str]] = {}
    for name in _SpecialTokens.__struct_fields__:
        for source in sources:
            if token := getattr(source, name):
                several = isinstance(token, list)
                found.setdefault(name, [token_text(one) for one in token] if several else token_text(token))
    return found
