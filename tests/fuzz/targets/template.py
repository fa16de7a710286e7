"""Chat templates, against plain Jinja with the functions of transformers."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tests.fuzz.mutations import text_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.errors import ConfigError
from pipeload.tasks.chat.template import ChatTemplate

_FOLDER = Path(__file__).parents[2] / "engine" / "tasks" / "chat" / "templates"
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello.", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "user", "content": "Bye"},
]
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
_WORDS = (
    "{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "messages", "message", "message.role", "bos_token",
    "['content']", "loop.index0", "loop.last", "namespace(x=1)", "ns.x", "{% for m in messages %}", "{% endfor %}",
    "{% for a in range(1000) %}", "{% for a in range(10**9) %}", "{% if true %}", "{% elif x %}", "{% else %}",
    "{% endif %}", "{% set x = 'ab' %}", "{% set x = x ~ x %}", "{% set ns.x = ns.x * 2 %}", "{% macro f(a) %}",
    "{% endmacro %}", "{{ f(f(1)) }}", "{% call f() %}", "{% endcall %}", "{% block b %}", "{% endblock %}",
    "{% filter upper %}", "{% endfilter %}", "{% include 'x' %}", "{% extends messages %}", "{% import 'os' as os %}",
    "{% raw %}", "{% endraw %}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{% continue %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{% with %}", "{% endwith %}",
    "|tojson", "|tojson(indent=9)", "|trim", "|join('x')", "|length", "|list", "|map(attribute='role')", "|upper",
    "|selectattr('role')", "|groupby('role')", "|sort", "|sum", "|batch(3)", "|slice(3)", "|replace('a', 'bb' * 9)",
    "|center(99)", "|format(1)", "|indent(400)", "|wordwrap(1)", "|urlize", "|xmlattr", "|string", "|int", "|round(9)",
    "|unique", "|reverse", "|first", "|items", "|dictsort", "|default(1)", "|e", "|striptags", "|pprint", "|abs",
    ".__class__", ".mro()", "['__globals__']", ".format(1)", ".format_map(x)", ".split()", ".strip('x')", ".items()",
    ".replace('', 'abc')", ".zfill(99999)", ".join(messages)", ".append(1)", ".pop()", ".encode()", ".startswith('a')",
    "raise_exception('no')", "strftime_now('%Y')", "'%9999d' % 1", "'{0:9999}'.format(1)", "2 ** 5000", "10 ** 9",
    "'a' * 10 ** 7", "[1] * 10 ** 7", "1 // 0", "-1", "1.5", "none", "true", " is defined", " is string", " in ",
    " not ", " and ", " or ", " ~ ", " + ", " * ", " == ", "[::-1]", "[1:]", "(", ")", "[", "]", "{", "}", ":", ",",
    "\n", "\\",
    "cycler(1, 2)", "joiner()", "lipsum()", "dict(a=1)", "self.b()", "caller()", "varargs", "\ud7ff", "\u202e", "'",
)  # fmt: skip
_UNSTEADY = re.compile(r"strftime_now|random|0x[0-9a-f]{6}|lipsum")


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _plain() -> ImmutableSandboxedEnvironment:
    """The environment of `apply_chat_template` of transformers."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # Constants would be computed while it is compiled, and some never end.
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False
    )
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return found


def _prepare() -> Trial:
    plain = _plain()

    def plainly(source: str, given: dict[str, Any]) -> str:
        return plain.from_string(source).render(
            messages=_MESSAGES, documents=None, add_generation_prompt=True, **_TOKENS, **given
        )

    def trial(data: bytes) -> bool:
        source = data.decode(errors="replace")
        template = ChatTemplate(source, "fuzz", _TOKENS)
        for given in ({"tools": None}, {"tools": _TOOLS}):
            try:
                found = template.render(_MESSAGES, **given)
            except ConfigError:
                try:
                    text = plainly(source, given)
                except Exception:  # noqa: BLE001 - whatever Jinja and Python have for it
                    return False
                raise Wrong("plain Jinja takes what was refused as unfit for the messages", text) from None
            text = plainly(source, given)
            if text != found and not _UNSTEADY.search(source + found):
                raise Wrong("the text is not that of plain Jinja", f"{found!r:.400} {text!r:.400}")
        return True

    return trial


TARGETS = (
    Target(
        name="template", what="chat templates", prepare=_prepare, mutate=text_of(_WORDS), native=True, share=1.5,
        seeds=lambda: [path.read_bytes() for path in sorted(_FOLDER.glob("*.jinja"))],
        memory_bytes=512 << 20, limit_s=10,
    ),
)  # fmt: skip
