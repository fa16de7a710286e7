"""Chat templates that reach for Python, for files, or for all time and memory; and messages that would be templates.

The attacker gives away a model with a chat template, or is a client who sends messages and tools. He wants to run a
program, to read a file, or to stop the server.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.attacks.attack import HELD, SucceededError, attack, refused, run_module

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.chat.template import ChatTemplate

_MESSAGES = [{"role": "user", "content": "hello"}]
_REACHING = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ ''['__cl' ~ 'ass__'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ ('{0.__class__}'|attr('format'))(messages) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ range.__class__ }}",
    "{{ (1).__class__ }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__.__name__') }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].__setitem__('a', 1) }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% from 'os' import popen %}",
    "{% extends '/etc/passwd' %}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ lipsum() }}{{ lipsum.__globals__ }}",
    "{% for x in loop.__class__ %}{% endfor %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
)
_MARKS = ("<class", "<function", "<module", "root:", "globals", "0x", "<built-in")
_BOMBS = (
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{% set ns = namespace(t='x') %}{% for a in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "{% set ns = namespace(t=[1]) %}{% for a in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "{% set ns = namespace(t=[1]) %}{% for a in range(99) %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (99999999999, 1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 99999999999) }}",
    "{{ 'x'.center(10**11) }}{{ 'x'|center(10**11) }}",
    "{{ 'x'.zfill(10**11) }}",
    "{{ 10 ** (10**10) }}",
    "{{ 9 ** (9**9) % 7 }}",
    "{% set t = 'x' * 999999 %}{{ t.replace('x', t) }}",
    "{% set t = 'x' * 999999 %}{{ t.replace('', t) }}",
    "{% set t = 'x' * 99999 %}{{ t.join(t) }}",
    "{% set t = 'x' * 99999 %}{{ t|join(t) }}",
    "{{ messages|tojson(indent=10**10) }}",
    "{{ 'x y'|indent(10**10, first=true) }}",
    "{{ ('x ' * 99999)|wordwrap(1, wrapstring='y' * 99999) }}",
    "{{ [1]|batch(10**10, 1)|list }}",
    "{{ [1]|slice(10**10)|list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% for a in range(n) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(9) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{{ strftime_now('%c' * 999999) }}",
    "{{ 'x'.expandtabs(10**10) }}",
    "{{ (1).to_bytes(10**10) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "{{ 1" + "+1" * 100_000 + " }}",
)


def _render(source: str) -> str:
    return ChatTemplate(source, "chat_template.jinja", {}).render(_MESSAGES)


@attack
def reaching_for_python(_folder: Path) -> str:
    """Attributes, filters, format strings, macros, globals, inclusion of files: nothing of Python's is reached."""
    outcome = HELD
    for source in _REACHING:
        try:
            text = _render(source)
        except (ShardError, ConfigError) as error:
            outcome = f"refused: {error}"
        else:
            if any(mark in text for mark in _MARKS):
                raise SucceededError(f"{source}: {text:.200}")
    if _MESSAGES != [{"role": "user", "content": "hello"}]:
        raise SucceededError("the messages were changed")
    return outcome


@attack
def taking_all_time_and_memory(_folder: Path) -> str:
    """Ranges, products, doublings, formats, recursion and nesting: each is stopped after a bounded amount of work."""
    outcome = HELD
    for source in _BOMBS:
        outcome = refused(lambda source=source: _render(source), (ShardError, ConfigError))
    return outcome


@attack
def templates_in_messages(_folder: Path) -> str:
    """Text, role, name and tools of a request that look like templates: they are data, and come out as they are."""
    evil = "{{ 7 * 7 }}{% for a in range(10**9) %}{% endfor %}{#"
    fields = {"role": evil, "content": evil, "name": evil, evil: evil, "__class__": evil}
    tools = [{"type": "function", "function": {"name": evil, "parameters": {"type": evil, "__init__": {}}}}]
    template = ChatTemplate("{{ messages|tojson }}{{ tools|tojson }}{{ messages[0].content }}", "x", {})
    text = template.render([fields], tools=tools)
    if text != json.dumps([fields]) + json.dumps(tools) + evil:
        raise SucceededError(text)
    return HELD


if __name__ == "__main__":
    run_module(Path(__file__).stem)
