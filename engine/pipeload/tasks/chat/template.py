"""Chat templates: Jinja programs that a model brings along, which turn messages into one text.

They run in Jinja's sandbox, with the functions and variables of transformers' `apply_chat_template`, and give the same
texts. Jinja (extra `chat`) is imported with this module, so callers import the module late.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from pipeload.errors import ConfigError, ShardError
from pipeload.foreign import first_line, foreign_errors
from pipeload.tasks.chat.sandbox import Sandbox

__all__ = ["ChatTemplate"]

_LONGEST_DATE = 1000
_EXPORT = "Export the model again."


class ChatTemplate:
    """A chat template, compiled. Safe to use from several threads.

    The sandbox keeps it from Python's internals, from files and from changing its inputs, and bounds its work.

    Args:
        source: the Jinja program.
        where: the name of its file in error messages.
        tokens: special tokens by their names in templates, such as `bos_token`.

    Raises:
        ShardError: it is no Jinja program.
    """

    def __init__(self, source: str, where: str, tokens: Mapping[str, Any]) -> None:
        self._where = where
        self._tokens = dict(tokens)
        self._sandbox = Sandbox(
            [_Generation, loopcontrols], {"tojson": _to_json}, {"raise_exception": _refuse, "strftime_now": _now}
        )
        with foreign_errors(ShardError, f"The chat template in {where} is damaged", _EXPORT):
            try:
                self._template = self._sandbox.template(source)
            except TemplateSyntaxError as error:
                raise ShardError(
                    f"The chat template in {where} is damaged in line {error.lineno}: {error}. {_EXPORT}"
                ) from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
            messages: dicts with `role` and `content`, and any other keys that the template reads.
            add_generation_prompt: end with the text that comes before an answer.
            **variables: for the template.

        Raises:
            ConfigError: the template refuses the messages, or fails on them.
            ShardError: the template uses a feature that the sandbox refuses.
        """
        given = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            self._sandbox.begin(messages, given)
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except SecurityError as error:
            raise ShardError(
                f"The chat template in {self._where} was stopped: {error}. A template of a model needs nothing of "
                "that kind: do not trust this one."
            ) from error
        except Exception as error:
            raise ConfigError(
                f"The chat template in {self._where} cannot take these messages: {first_line(error)}. "
                "Pass messages with the roles, and in the order, that the model was trained with."
            ) from error


class _Generation(Extension):
    """The block `{% generation %}`, with which training marks answers; it renders only its content."""

    tags = {"generation"}  # noqa: RUF012 - as the class above has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters that are special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    if len(pattern) > _LONGEST_DATE:
        raise SecurityError(f"it asks for a date in {len(pattern)} characters")
    return datetime.now().strftime(pattern)
