"""The limits of chat templates: all that a model's template does is allowed, and nothing that a process cannot bear."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tests.marks import slow

from pipeload.errors import ConfigError, ShardError

pytest.importorskip("jinja2")

from pipeload.tasks.chat.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hello"}]


def _render(source: str, messages: Any = MESSAGES, **variables: object) -> str:
    return ChatTemplate(source, "tokenizer_config.json", {}).render(messages, **variables)


def _nested(depth: int, inside: str = "") -> str:
    loops = "".join(f"{{% for a{level} in range(1000) %}}" for level in range(depth))
    return loops + inside + "{% endfor %}" * depth


def _doubled(grown: str, *, rounds: int = 60, first: str = "'x'") -> str:
    return (
        f"{{% set n = namespace(x={first}) %}}{{% for i in range({rounds}) %}}{{% set n.x = {grown} %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% continue %}",
        _nested(25),
        "{% if true %}" * 200 + "{% endif %}" * 200,
        "{{ " + "9" * 5000 + " }}",
        "{% macro f(a, a) %}{% endmacro %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{{ '" + "a" * 10 + "\\N{nothing}' }}",
    ],
    ids=["break", "continue", "loops", "ifs", "digits", "arguments", "brackets", "signs", "escape"],
)
def test_what_cannot_be_compiled_is_a_damaged_file(source: str) -> None:
    with pytest.raises(
        ShardError, match=r"in tokenizer_config\.json is damaged.*\. Export the model again\.$"
    ) as raised:
        _render(source)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    "source",
    [
        _nested(3),
        _nested(10),
        slow("{% for a in range(1000) if range(100000)|list|length %}{% endfor %}"),
        slow("{% for a in range(1000) recursive %}{{ loop(range(1000)) if loop.depth < 4 }}{% endfor %}"),
        "{% macro f() %}" + _nested(2) + "{% endmacro %}" + _nested(1, "{{ f() }}"),
        _nested(2, "{% set x = range(1000) | sum %}"),
        _nested(2, "{{ '' }}") + "{{ self.a() }}{% block a %}{% endblock %}",
        "{% block a %}long{% endblock %}{{ self.a() }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    with pytest.raises(
        ShardError, match=r"was stopped: it (loops on and on|makes|prints a block).*do not trust this one"
    ):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ 'x'.rjust(10000000000) }}",
        "{{ '1'.zfill(10000000000) }}",
        "{{ '\t'.expandtabs(10000000000) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x' | center(width=10000000000) }}",
        "{{ 'a\nb' | indent(10000000000) }}",
        "{{ [[1]] | tojson(indent=10000000000) }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ [1] | slice(10000000000) | list }}",
        "{{ 1 | round(10000000000, 'ceil') }}",
        "{{ lipsum(10000000000) }}",
        "{{ strftime_now('%Y' * 100000) }}",
        "{{ ('x' * 100000).replace('x', 'x' * 100000) }}",
        "{{ ('x' * 100000) | replace('x', 'x' * 100000) }}",
        "{{ ('x' * 100000).replace('', 'x' * 100000) }}",
        "{{ ('x' * 100000).join(['y'] * 100000) }}",
        "{{ (['y'] * 100000) | join('x' * 100000) }}",
        "{{ (['y'] * 100000) | join(d='x' * 100000) }}",
        slow("{{ range(100000) | map('string') | join('x' * 100000) }}"),
        slow("{{ ('x' * 100000).join(range(100000) | map('string')) }}"),
        "{{ ('x' * 100000).translate({120: 'x' * 100000}) }}",
        "{{ ('{0}' * 100000).format('x' * 100000) }}",
        "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
        _doubled("n.x ~ n.x"),
        _doubled("n.x + n.x"),
        _doubled("[n.x, n.x]"),
        slow(_doubled("(n.x, n.x)")),
        _doubled("{'a': n.x, 'b': n.x}"),
        slow(_doubled("dict(a=n.x, b=n.x)")),
        _doubled("namespace(a=n.x, b=n.x)"),
        _doubled("n.x * n.x", first="3"),
        _doubled("(n.x | string) * 9"),
        _doubled("[n.x, n.x] | join"),
        _doubled("n.x | replace('x', 'xx')"),
        _doubled("n.x.replace('x', 'xx')"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ n }}"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ n ~ n }}"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ n | upper }}"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ '%s' % n }}"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ '{}'.format(n) }}"),
        slow("{% set n = namespace() %}{% set n.x = [n, n] %}{{ raise_exception(n) }}"),
        "{% set x = 'x' * 900000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
        "{% set x = 'x' * 900000 %}{% set y %}{% for i in range(1000) %}{{ x }}{% endfor %}{% endset %}",
        "{% macro f() %}{% set x = 'x' * 900000 %}{% for i in range(1000) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
        "{% set x = 'x' * 900000 %}{% for i in range(1000) %}{% set y = x[1:] %}{% endfor %}",
        slow("{% set x = 'x' * 900000 %}{% for i in range(100000) %}{% set y = x ~ 'a' == x ~ 'b' %}{% endfor %}"),
        slow("{% set x = 'x' * 900000 %}{% set y = x[:] ~ 'y' %}{% for i in range(100000) if x == y %}{% endfor %}"),
    ],
)
def test_a_template_that_makes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(ShardError, match=r"was stopped: .*do not trust this one"):
        _render(source)


def test_constants_are_not_computed_while_a_template_is_compiled() -> None:
    ChatTemplate("{{ 'x' | center(10 ** 10) }}{% set x = 'x' * 10 ** 10 %}", "tokenizer_config.json", {})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index ~ m.role }}{{ loop.last }}{{ loop.length }}{% endfor %}", "1userTrue1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}", "1(2, 3)"),
        ("{{ '%-5s|' % 'ab' }}{{ '{:>5}|{{}}'.format('ab') }}{{ '%s' | format(3) }}", "ab   |   ab|{}3"),
        ("{{ 'ab'.center(6) }}|{{ 'ab' | center(6) }}|{{ 'a-b'.replace('-', '+') }}", "  ab  |  ab  |a+b"),
        ("{{ [1, 2] | map('string') | join('-') }}{{ '-'.join(['a', 'b']) }}", "1-2a-b"),
        ("{{ messages[0]['content'][1:3] }}{{ messages[::-1] | length }}", "el1"),
        ("{{ 2 ** 10 }}{{ 7 % 4 }}{{ 3 * 'ab' }}{{ [0] * 2 }}{{ 1.5 * 2 }}", "10243ababab[0, 0]3.0"),
        ("{{ {'b': [1, {}]} | tojson(indent=2) }}", '{\n  "b": [\n    1,\n    {}\n  ]\n}'),
        ("{% macro f(a, b=2) %}{{ a + b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}", "3"),
        ("{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        ("{{ nothing is defined }}{{ messages[0].x is none }}{{ nothing ~ 'a' }}", "FalseFalsea"),
        ("{% block a %}x{% endblock %}", "x"),
        ("{{ 'role' in messages[0] and 1 < 2 <= 3 }}", "True"),
        ("{% set x %}a{{ 1 }}b{% endset %}{{ x | length }}", "3"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "Hello"),
    ],
)
def test_what_templates_do_is_as_without_bounds(source: str, text: str) -> None:
    assert _render(source) == text


def test_bounds_grow_with_the_conversation() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 300
    source = (
        "{% for m in messages %}{% for other in messages[:100] %}{% set x = other.role == m.role %}{% endfor %}"
        "{{ '<' ~ m.role ~ '>' + m.content | trim + m.content.replace(' ', '_') }}{% endfor %}"
    )
    assert len(_render(source, messages)) == 300 * (len("<user>") + len("word " * 2000) * 2 - 1)


def test_each_rendering_has_its_own_bounds() -> None:
    template = ChatTemplate("{% for i in range(100000) %}{% endfor %}end", "a file", {})
    found = [template.render(MESSAGES) for _ in range(6)]
    thread = threading.Thread(target=lambda: found.append(template.render(MESSAGES)))
    thread.start()
    thread.join()
    assert found == ["end"] * 7


def test_a_variable_that_fails_is_the_cause() -> None:
    def fails() -> None:
        raise MemoryError

    with pytest.raises(ConfigError, match="cannot take these messages: MemoryError") as raised:
        _render("{{ f() }}", f=fails)
    assert isinstance(raised.value.__cause__, MemoryError)


@pytest.mark.parametrize("source", ["''.join(1)", "1 | join", "{} + 1", "x()", "[] * []", "1 % 0"])
def test_what_an_expression_raises_is_the_cause(source: str) -> None:
    with pytest.raises(ConfigError, match="cannot take these messages") as raised:
        _render(f"{{{{ {source} }}}}", [{"role": "user"}] * 2)
    assert raised.value.__cause__ is not None
